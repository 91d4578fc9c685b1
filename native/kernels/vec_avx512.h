// Vector traits of the tiers with 512-bit registers and VNNI. See vec_generic.h for the meaning.
#pragma once

#include <cstddef>
#include <cstdint>
#if EARNEST_SIMDE
#include "emulate/simde.h"
#else
#include <immintrin.h>
#endif

namespace earnest {
namespace {

struct Vec {
  // Queries that attention works on together; accumulators that leave room for what they meet.
  static constexpr int kQueries = 6, kAccumulators = 24;
  // 2 panels x 6 tokens: 12 integer and 12 float accumulators, 4 weights, 2 scales of 32 registers.
  static constexpr int kPanels = 2, kTokens[] = {6, 6}, kFloatTokens = 4, kUnexpanded = 48;
  static constexpr int kSignedOffset = 128;  // dpbusd takes unsigned x signed

  using F = __m512;
  using I = __m512i;
  using B = __m512i;
  using A = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F neg(F a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F fromBytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F fromSignedBytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void bf16Pair(const uint8_t* p, F& even, F& odd) {
    const __m512i pair = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(int32_t(0xffff0000))));
  }

  static I zeroI() { return _mm512_setzero_si512(); }
  static I set1I(int32_t x) { return _mm512_set1_epi32(x); }
  static I addI(I a, I b) { return _mm512_add_epi32(a, b); }
  static I shift7(I a) { return _mm512_slli_epi32(a, 7); }
  static F toFloat(I a) { return _mm512_cvtepi32_ps(a); }

  static F magnitude(F a) { return _mm512_abs_ps(a); }
  static F greater(F a, F b) { return _mm512_max_ps(a, b); }
  static F zeroBelow(F x, F least, F value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ), value);
  }
  static F timesPower(F x, F shifted) {
    return _mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_castps_si512(x), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
  }
#if EARNEST_SIMDE  // which lacks the operations of the others; sums of 8 in another order
  static float greatest(F a) {
    float all[16];
    store(all, a);
    float most = all[0];
    for (float x : all) most = x > most ? x : most;
    return most;
  }
  static float sum(F a) {
    float all[16];
    store(all, a);
    for (int half = 8; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) all[i] += all[i + half];
    return all[0];
  }
  static void greatestOf8(const F (&x)[8], float* out) {
    for (int i = 0; i < 8; ++i) out[i] = greatest(x[i]);
  }
  static void sumOf8(const F (&x)[8], float* out) {
    for (int i = 0; i < 8; ++i) out[i] = sum(x[i]);
  }
  static void storeShorts(uint8_t* p, F a) {
    float all[16];
    store(all, a);
    for (int i = 0; i < 16; ++i) {
      const int16_t x = static_cast<int16_t>(__builtin_lrintf(all[i]));
      __builtin_memcpy(p + 2 * i, &x, 2);
    }
  }
#else
  static float greatest(F a) { return _mm512_reduce_max_ps(a); }
  static float sum(F a) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  // Of 8 vectors each, through transposing: a third of the shuffles. In the order of `sum`, so that
  // all tiers find the same: elements 8 apart first, then 4, 2 and 1.
  template <class Op>
  static void of8(const F (&x)[8], float* out, Op op) {
    F pair[4], four[2];
    for (int i = 0; i < 4; ++i)
      pair[i] = op(_mm512_shuffle_f32x4(x[i], x[i + 4], 0x44),
                   _mm512_shuffle_f32x4(x[i], x[i + 4], 0xee));
    for (int i = 0; i < 2; ++i)
      four[i] = op(_mm512_shuffle_f32x4(pair[2 * i], pair[2 * i + 1], 0x88),
                   _mm512_shuffle_f32x4(pair[2 * i], pair[2 * i + 1], 0xdd));
    // Four numbers each of vectors 0, 4, 1, 5 and of 2, 6, 3, 7.
    const __m512d a = _mm512_castps_pd(four[0]), b = _mm512_castps_pd(four[1]);
    const F two = op(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                     _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    const F all = op(two, _mm512_permute_ps(two, 0xb1));
    const __m512i order = _mm512_setr_epi32(0, 8, 2, 10, 4, 12, 6, 14, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, all)));
  }
  static void greatestOf8(const F (&x)[8], float* out) { of8(x, out, greater); }
  static void sumOf8(const F (&x)[8], float* out) { of8(x, out, add); }
  static void storeShorts(uint8_t* p, F a) {
    const __m256i shorts = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), shorts);
  }
#endif

  using Pairs = __m512i;
  static Pairs loadPairs(const uint8_t* p) { return _mm512_loadu_si512(p); }
#if EARNEST_SIMDE
  static I broadcastPair(const uint8_t* p) {
    int32_t two;
    __builtin_memcpy(&two, p, 4);
    return _mm512_set1_epi32(two);
  }
  static I dotPairs(I sum, Pairs x, I pair) { return _mm512_dpwssd_epi32(sum, x, pair); }
#else
  // gcc 12 would broadcast with an operation of its own.
  static const uint8_t* broadcastPair(const uint8_t* p) { return p; }
  static I dotPairs(I sum, Pairs x, const uint8_t* pair) {
    const auto& two = *reinterpret_cast<const uint8_t(*)[4]>(pair);
    __asm__("vpdpwssd %1%{1to16%}, %2, %0" : "+v"(sum) : "m"(two), "v"(x));
    return sum;
  }
#endif

  static A broadcast(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }

  static B loadB(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void storeB(uint8_t* p, B b) { _mm512_storeu_si512(p, b); }
  // Keeps both halves of a nibble vector from being loaded a second time, as gcc likes to: half of
  // these loads cross a cache line.
#if EARNEST_SIMDE
  static void hold(B&) {}
#else
  static void hold(B& b) { __asm__("" : "+v"(b)); }
#endif
  static B lowNibbles(B b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
  static B highNibbles(B b) {
    return _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(15));
  }
#if !EARNEST_SIMDE  // which cannot shift so
  // Sixteen times the high nibbles, for sums that are divided by it in the end.
  static B raisedNibbles(B b) { return _mm512_and_si512(b, _mm512_set1_epi8(int8_t(0xf0))); }
  static I lower4(I a) { return _mm512_srai_epi32(a, 4); }
#endif
  static B flipSign(B b) { return _mm512_xor_si512(b, _mm512_set1_epi8(int8_t(0x80))); }
  template <int kAt, int kWidth>
  static B withHigh(B b, B h) {
    const B mask = _mm512_set1_epi8(((1 << kWidth) - 1) << 4);
    B moved = h;
    if constexpr (kAt < 4) moved = _mm512_slli_epi16(h, 4 - kAt);
    if constexpr (kAt > 4) moved = _mm512_srli_epi16(h, kAt - 4);
    return _mm512_ternarylogic_epi32(b, moved, mask, 0xf8);  // b | (moved & mask)
  }
  // Nibbles with two upper bits each, at kAt and kAt + 2 of `high`: masked once for several groups,
  // these need no mask of their own, and neither do the nibbles.
  template <int kAt>
  static void sixBits(B both, B high, B& even, B& odd) {
    static_assert(kAt == 0 || kAt == 4);
    const B nibble = _mm512_set1_epi8(15);  // picks these bits of the first, the others of the second
    B first = _mm512_and_si512(high, _mm512_set1_epi8(0x33));
    B second = _mm512_and_si512(high, _mm512_set1_epi8(int8_t(0xcc)));
    if constexpr (kAt == 0) first = _mm512_slli_epi16(first, 4);
    second = kAt == 0 ? _mm512_slli_epi16(second, 2) : _mm512_srli_epi16(second, 2);
    even = _mm512_ternarylogic_epi32(both, first, nibble, 0xe4);
    odd = _mm512_ternarylogic_epi32(_mm512_srli_epi16(both, 4), second, nibble, 0xe4);
  }
  template <int kAt>
  static void sixBit(B low, B high, uint8_t* scales, uint8_t* minima) {
    B even, odd;
    sixBits<kAt>(low, high, even, odd);
    storeB(scales, even);
    storeB(minima, odd);
  }

  template <int kMax, bool kSigned, int kChains>
  struct Sum {
    I v[kChains] = {};
    template <int kGroup>
    void add(B w, A a) {
      v[kGroup % kChains] = _mm512_dpbusd_epi32(v[kGroup % kChains], w, a);
    }
    I total() const { return kChains == 2 ? addI(v[0], v[kChains - 1]) : v[0]; }
#if !EARNEST_SIMDE
    // Begins with a number in memory: to broadcast one from a register takes the vector units.
    void begin(int32_t x) {
      __asm__("" : "+m"(x));
      v[0] = _mm512_set1_epi32(x);
    }
    // One operation, where the activations meet no other weights; gcc 12 makes two of it.
    template <int kGroup>
    void addAt(B w, const int8_t* a) {
      const auto& four = *reinterpret_cast<const int8_t(*)[4]>(a);
      __asm__("vpdpbusd %1%{1to16%}, %2, %0" : "+v"(v[kGroup % kChains]) : "m"(four), "v"(w));
    }
    void keep() { __asm__("" : "+v"(v[0])); }
#endif
  };

  static void storeHalves(uint8_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0));
  }
};

}  // namespace
}  // namespace earnest
