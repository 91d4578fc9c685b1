// Vector traits of the tiers with 256-bit registers: a vector is two of them. With AVX-VNNI
// (EARNEST_AVXVNNI) byte products go to int32 at once; without it through int16, as far as the
// range of the weights allows. See vec_generic.h for the meaning.
#pragma once

#include <cstddef>
#include <cstdint>
#include <immintrin.h>
#if EARNEST_VNNI_MODEL
#include "emulate/vnni_model.h"
#endif

namespace earnest {
namespace {

struct Vec {
  static constexpr int kQueries = 5, kAccumulators = 5;  // of attention, see vec_generic.h
  static constexpr int kPanels = 1, kFloatTokens = 2;
#if EARNEST_AVXVNNI
  static constexpr int kTokens[] = {4, 4}, kUnexpanded = 8;
  static constexpr int kSignedOffset = 128;  // dpbusd takes unsigned x signed
#else
  // Sums of 16 and of 32 bits of every token and plane, in 16 registers.
  static constexpr int kTokens[] = {3, 2}, kUnexpanded = 8;
  static constexpr int kSignedOffset = 0;
#endif

  struct F { __m256 a, b; };
  struct I { __m256i a, b; };
  struct B { __m256i a, b; };
  using A = __m256i;

  static const __m256i* p256(const void* p) { return static_cast<const __m256i*>(p); }

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set1(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F neg(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_xor_ps(x.a, sign), _mm256_xor_ps(x.b, sign)};
  }
  static F fma(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static F halves(const uint8_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
  }
  static F fromBytes(const uint8_t* p) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)))};
  }
  static F fromSignedBytes(const uint8_t* p) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
  }
  static void bf16Pair(const uint8_t* p, F& even, F& odd) {
    const __m256i mask = _mm256_set1_epi32(int32_t(0xffff0000));
    const __m256i x = _mm256_loadu_si256(p256(p)), y = _mm256_loadu_si256(p256(p + 32));
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(y, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(x, mask)),
           _mm256_castsi256_ps(_mm256_and_si256(y, mask))};
  }

  static I zeroI() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I set1I(int32_t x) { const __m256i v = _mm256_set1_epi32(x); return {v, v}; }
  static I addI(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static I shift7(I x) { return {_mm256_slli_epi32(x.a, 7), _mm256_slli_epi32(x.b, 7)}; }
  static F toFloat(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

  static F magnitude(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
  }
  static F greater(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F zeroBelow(F x, F least, F value) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.a, least.a, _CMP_NLT_UQ), value.a),
            _mm256_and_ps(_mm256_cmp_ps(x.b, least.b, _CMP_NLT_UQ), value.b)};
  }
  static __m256 timesPower(__m256 x, __m256 shifted) {
    return _mm256_castsi256_ps(_mm256_add_epi32(
        _mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
  }
  static F timesPower(F x, F shifted) {
    return {timesPower(x.a, shifted.a), timesPower(x.b, shifted.b)};
  }
  static float greatest(F x) {
    const __m256 half = _mm256_max_ps(x.a, x.b);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static float sum(F x) {
    const __m256 half = _mm256_add_ps(x.a, x.b);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static void greatestOf8(const F (&x)[8], float* out) {
    for (int i = 0; i < 8; ++i) out[i] = greatest(x[i]);
  }
  static void sumOf8(const F (&x)[8], float* out) {
    for (int i = 0; i < 8; ++i) out[i] = sum(x[i]);
  }
  static void storeShorts(uint8_t* p, F x) {
    const __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xd8));
  }

  struct Pairs { __m256i a, b; };
  static Pairs loadPairs(const uint8_t* p) {
    return {_mm256_loadu_si256(p256(p)), _mm256_loadu_si256(p256(p + 32))};
  }
  static __m256i broadcastPair(const uint8_t* p) {
    int32_t two;
    __builtin_memcpy(&two, p, 4);
    return _mm256_set1_epi32(two);
  }
  static I dotPairs(I sum, Pairs x, __m256i pair) {
#if EARNEST_AVXVNNI
    return {_mm256_dpwssd_avx_epi32(sum.a, x.a, pair), _mm256_dpwssd_avx_epi32(sum.b, x.b, pair)};
#else
    I added = {_mm256_add_epi32(sum.a, _mm256_madd_epi16(x.a, pair)),
               _mm256_add_epi32(sum.b, _mm256_madd_epi16(x.b, pair))};
    now(added.a, added.b);
    return added;
#endif
  }

  // Sums that are wanted now: gcc would multiply first and add later, in an order of its own, with
  // dozens of products waiting on the stack.
  static void now(__m256i& a, __m256i& b) { __asm__("" : "+x"(a), "+x"(b)); }

  static A broadcast(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }

  static B loadB(const uint8_t* p) {
    return {_mm256_loadu_si256(p256(p)), _mm256_loadu_si256(p256(p + 32))};
  }
  static void storeB(uint8_t* p, B x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
  }
  static void hold(B& b) { __asm__("" : "+x"(b.a), "+x"(b.b)); }
  static B lowNibbles(B x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
  }
  static B highNibbles(B x) {
    return lowNibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
  }
  static B flipSign(B x) {
    const __m256i sign = _mm256_set1_epi8(int8_t(0x80));
    return {_mm256_xor_si256(x.a, sign), _mm256_xor_si256(x.b, sign)};
  }
  template <int kAt, int kWidth>
  static __m256i withHigh(__m256i b, __m256i h) {
    const __m256i mask = _mm256_set1_epi8(((1 << kWidth) - 1) << 4);
    if constexpr (kAt < 4) h = _mm256_slli_epi16(h, 4 - kAt);
    if constexpr (kAt > 4) h = _mm256_srli_epi16(h, kAt - 4);
    return _mm256_or_si256(b, _mm256_and_si256(h, mask));
  }
  template <int kAt, int kWidth>
  static B withHigh(B x, B h) {
    return {withHigh<kAt, kWidth>(x.a, h.a), withHigh<kAt, kWidth>(x.b, h.b)};
  }
  template <int kAt>
  static void sixBit(B low, B high, uint8_t* scales, uint8_t* minima) {
    storeB(scales, withHigh<kAt, 2>(lowNibbles(low), high));
    storeB(minima, withHigh<kAt + 2, 2>(highNibbles(low), high));
  }

#if EARNEST_AVXVNNI
  template <int kMax, bool kSigned, int kChains>
  struct Sum {
    I v[kChains] = {};
    template <int kGroup>
    void add(B w, A a) {
      I& s = v[kGroup % kChains];
      s.a = _mm256_dpbusd_avx_epi32(s.a, w.a, a);
      s.b = _mm256_dpbusd_avx_epi32(s.b, w.b, a);
    }
    I total() const { return kChains == 2 ? addI(v[0], v[kChains - 1]) : v[0]; }
  };
#else
  // maddubs adds two products of unsigned x signed bytes in an int16 lane, so 32767 / (2 * 127 *
  // kMax) groups can be added before they must widen: 8 for nibbles, 4 for 5 bits, 2 for 6, 1 for
  // signed bytes. Those become |w| and a with the sign of w; |-128| is 128 as an unsigned byte,
  // and 2 * 128 * 127 = 32512 still fits.
  template <int kMax, bool kSigned, int kChains>
  struct Sum {
    static constexpr int kGroups = 32767 / (2 * 127 * kMax);
    I v = zeroI();
    __m256i a16, b16;

    template <int kGroup>
    void add(B w, A a) {
      __m256i x, y;
      if constexpr (kSigned) {
        x = _mm256_maddubs_epi16(_mm256_abs_epi8(w.a), _mm256_sign_epi8(a, w.a));
        y = _mm256_maddubs_epi16(_mm256_abs_epi8(w.b), _mm256_sign_epi8(a, w.b));
      } else {
        x = _mm256_maddubs_epi16(w.a, a);
        y = _mm256_maddubs_epi16(w.b, a);
      }
      if constexpr (kGroup % kGroups == 0) {
        a16 = x;
        b16 = y;
      } else {
        a16 = _mm256_add_epi16(a16, x);
        b16 = _mm256_add_epi16(b16, y);
        now(a16, b16);
      }
      if constexpr ((kGroup + 1) % kGroups == 0) widen();
    }
    void widen() {
      const __m256i one = _mm256_set1_epi16(1);
      v.a = _mm256_add_epi32(v.a, _mm256_madd_epi16(a16, one));
      v.b = _mm256_add_epi32(v.b, _mm256_madd_epi16(b16, one));
    }
    I total() const { return v; }
  };
#endif

  static void storeHalves(uint8_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, 0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), _mm256_cvtps_ph(x.b, 0));
  }
};

}  // namespace
}  // namespace earnest
