// The bf16 instructions of kernels/bf16_pairs.inl as scalar loops, after the operation sections of
// Intel's manual (Software Developer's Manual, volume 2, VDPBF16PS and VCVTNE2PS2BF16). Test builds
// only. Rounding is to nearest, ties to even; denormals count as zero, whether read or made.
#pragma once

#include <cstdint>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace earnest {
namespace {

inline uint32_t modelBits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

// Of bits whose exponent is 0 the sign is left.
inline float modelFloat(uint32_t bits) {
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// Whether a result is denormal is seen after rounding as if there were room for any exponent: found
// on Zen 4; the manual does not say.
inline float modelFma(float a, float b, float c) {
  const float sum = __builtin_fmaf(a, b, c);
  if (__builtin_fabsf(sum) == 0x1p-126f &&
      __builtin_fabsf(__builtin_fmaf(a * 0x1p64f, b, c * 0x1p64f)) < 0x1p-62f)
    return sum < 0 ? -0.0f : 0.0f;
  return modelFloat(modelBits(sum));
}

// One of 16 sums. A pair has the even column in its lower half.
inline float modelPair(float sum, uint32_t w, uint32_t x) {
  sum = modelFma(modelFloat(w & 0xffff0000u), modelFloat(x & 0xffff0000u),
                 modelFloat(modelBits(sum)));
  return modelFma(modelFloat(w << 16), modelFloat(x << 16), sum);
}

inline uint16_t modelRound(float x) {
  uint32_t bits = modelBits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  bits = modelBits(modelFloat(bits));
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

#if defined(__AVX512F__)
inline __m512 addPairs(__m512 sums, __m512i w, __m512i x) {
  float s[16];
  uint32_t a[16], b[16];
  __builtin_memcpy(s, &sums, 64);
  __builtin_memcpy(a, &w, 64);
  __builtin_memcpy(b, &x, 64);
  for (int i = 0; i < 16; ++i) s[i] = modelPair(s[i], a[i], b[i]);
  __builtin_memcpy(&sums, s, 64);
  return sums;
}

inline __m512i toBf16(__m512 first, __m512 second) {
  float x[32];
  uint16_t out[32];
  __builtin_memcpy(x, &first, 64);
  __builtin_memcpy(x + 16, &second, 64);
  for (int i = 0; i < 32; ++i) out[i] = modelRound(x[i]);
  __m512i result;
  __builtin_memcpy(&result, out, 64);
  return result;
}
#endif

}  // namespace
}  // namespace earnest
