// Intel's 512-bit intrinsics as SIMDe's portable functions over AVX2, and what SIMDe 0.7 lacks as
// plain loops. Test builds only: a tier compiled with EARNEST_SIMDE runs on machines without it.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <cstdint>
#include <immintrin.h>
#include <simde/x86/avx512.h>

namespace earnest {
namespace {

inline __m512 simdeHalves(__m256i halves) {
  __m128i parts[2];
  __builtin_memcpy(parts, &halves, 32);
  const __m256 floats[2] = {_mm256_cvtph_ps(parts[0]), _mm256_cvtph_ps(parts[1])};
  __m512 out;
  __builtin_memcpy(&out, floats, 64);
  return out;
}

inline __m256i simdeToHalves(__m512 x) {
  __m256 floats[2];
  __builtin_memcpy(floats, &x, 64);
  const __m128i parts[2] = {_mm256_cvtps_ph(floats[0], 0), _mm256_cvtps_ph(floats[1], 0)};
  __m256i out;
  __builtin_memcpy(&out, parts, 32);
  return out;
}

inline __m512 simdeFloats(__m512i integers) {
  int32_t in[16];
  float out[16];
  __builtin_memcpy(in, &integers, 64);
  for (int i = 0; i < 16; ++i) out[i] = static_cast<float>(in[i]);
  __m512 result;
  __builtin_memcpy(&result, out, 64);
  return result;
}

template <class Byte>
inline __m512i simdeWiden(__m128i bytes) {
  Byte in[16];
  int32_t out[16];
  __builtin_memcpy(in, &bytes, 16);
  for (int i = 0; i < 16; ++i) out[i] = in[i];
  __m512i result;
  __builtin_memcpy(&result, out, 64);
  return result;
}

}  // namespace
}  // namespace earnest

#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps earnest::simdeFloats
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 earnest::simdeWiden<uint8_t>
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 earnest::simdeWiden<int8_t>
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) earnest::simdeToHalves(x)
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps earnest::simdeHalves
