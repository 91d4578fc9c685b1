// AVX-VNNI's dot products of bytes and of 16-bit integers as loops (Software Developer's Manual,
// VPDPBUSD and VPDPWSSD). Test builds only.
#pragma once

#include <cstdint>
#include <immintrin.h>

namespace earnest {
namespace {

inline __m256i modelDpbusd(__m256i sums, __m256i unsigned_bytes, __m256i signed_bytes) {
  int32_t s[8];
  uint8_t u[32];
  int8_t b[32];
  __builtin_memcpy(s, &sums, 32);
  __builtin_memcpy(u, &unsigned_bytes, 32);
  __builtin_memcpy(b, &signed_bytes, 32);
  for (int i = 0; i < 32; ++i) s[i / 4] += int32_t{u[i]} * b[i];
  __builtin_memcpy(&sums, s, 32);
  return sums;
}

inline __m256i modelDpwssd(__m256i sums, __m256i x, __m256i y) {
  int32_t s[8];
  int16_t a[16], b[16];
  __builtin_memcpy(s, &sums, 32);
  __builtin_memcpy(a, &x, 32);
  __builtin_memcpy(b, &y, 32);
  for (int i = 0; i < 16; ++i) s[i / 2] += int32_t{a[i]} * b[i];
  __builtin_memcpy(&sums, s, 32);
  return sums;
}

}  // namespace
}  // namespace earnest

#define _mm256_dpwssd_avx_epi32 earnest::modelDpwssd
#define _mm256_dpbusd_avx_epi32 earnest::modelDpbusd
