// Vector traits of 64-bit Arm with dot products: a vector is four 128-bit registers.
// See vec_generic.h for the meaning.
#pragma once

#include <arm_neon.h>
#include <cstddef>
#include <cstdint>

namespace earnest {
namespace {

struct Vec {
  static constexpr int kQueries = 4, kAccumulators = 4;  // of attention, see vec_generic.h
  // 4 tokens: 16 integer accumulators of 32 registers; the float ones live in the first cache.
  static constexpr int kPanels = 1, kTokens[] = {4, 4}, kFloatTokens = 2, kUnexpanded = 4;
  static constexpr int kSignedOffset = 0;  // sdot takes signed x signed

  struct F { float32x4_t v[4]; };
  struct I { int32x4_t v[4]; };
  struct B { uint8x16_t v[4]; };
  using A = int8x16_t;

// Spelled out, not a loop: gcc at -O2 would keep the four in memory and walk them.
#define EARNEST_FOUR(...)               \
  do {                                  \
    { constexpr int i = 0; __VA_ARGS__; } \
    { constexpr int i = 1; __VA_ARGS__; } \
    { constexpr int i = 2; __VA_ARGS__; } \
    { constexpr int i = 3; __VA_ARGS__; } \
  } while (0)
  static F zero() { return set1(0); }
  static F set1(float x) { F r; EARNEST_FOUR(r.v[i] = vdupq_n_f32(x)); return r; }
  static F load(const float* p) { F r; EARNEST_FOUR(r.v[i] = vld1q_f32(p + 4 * i)); return r; }
  static void store(float* p, F x) { EARNEST_FOUR(vst1q_f32(p + 4 * i, x.v[i])); }
  static F add(F x, F y) { EARNEST_FOUR(x.v[i] = vaddq_f32(x.v[i], y.v[i])); return x; }
  static F mul(F x, F y) { EARNEST_FOUR(x.v[i] = vmulq_f32(x.v[i], y.v[i])); return x; }
  static F neg(F x) { EARNEST_FOUR(x.v[i] = vnegq_f32(x.v[i])); return x; }
  static F fma(F x, F y, F z) {
    EARNEST_FOUR(z.v[i] = vfmaq_f32(z.v[i], x.v[i], y.v[i]));
    return z;
  }
  static F halves(const uint8_t* p) {
    F r;
    EARNEST_FOUR(r.v[i] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i))));
    return r;
  }
  static F fromBytes(const uint8_t* p) {
    const uint8x16_t b = vld1q_u8(p);
    const uint16x8_t x = vmovl_u8(vget_low_u8(b)), y = vmovl_u8(vget_high_u8(b));
    return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(x))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(x))),
             vcvtq_f32_u32(vmovl_u16(vget_low_u16(y))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(y)))}};
  }
  static F fromSignedBytes(const uint8_t* p) {
    const int8x16_t b = vreinterpretq_s8_u8(vld1q_u8(p));
    const int16x8_t x = vmovl_s8(vget_low_s8(b)), y = vmovl_s8(vget_high_s8(b));
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(x))),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(y))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(y)))}};
  }
  static void bf16Pair(const uint8_t* p, F& even, F& odd) {
    EARNEST_FOUR(
      const uint32x4_t pair = vreinterpretq_u32_u8(vld1q_u8(p + 16 * i));
      even.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(pair, 16));
      odd.v[i] = vreinterpretq_f32_u32(vandq_u32(pair, vdupq_n_u32(0xffff0000u))));
  }

  static I zeroI() { return set1I(0); }
  static I set1I(int32_t x) { I r; EARNEST_FOUR(r.v[i] = vdupq_n_s32(x)); return r; }
  static I addI(I x, I y) { EARNEST_FOUR(x.v[i] = vaddq_s32(x.v[i], y.v[i])); return x; }
  static I shift7(I x) { EARNEST_FOUR(x.v[i] = vshlq_n_s32(x.v[i], 7)); return x; }
  static F toFloat(I x) { F r; EARNEST_FOUR(r.v[i] = vcvtq_f32_s32(x.v[i])); return r; }

  static F magnitude(F x) { EARNEST_FOUR(x.v[i] = vabsq_f32(x.v[i])); return x; }
  // The second one where the first is NaN, and NaN where the second is.
  static F greater(F x, F y) {
    EARNEST_FOUR(y.v[i] = vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]));
    return y;
  }
  static F zeroBelow(F x, F least, F value) {
    EARNEST_FOUR(value.v[i] = vreinterpretq_f32_u32(
                     vbicq_u32(vreinterpretq_u32_f32(value.v[i]), vcltq_f32(x.v[i], least.v[i]))));
    return value;
  }
  static F timesPower(F x, F shifted) {
    EARNEST_FOUR(x.v[i] = vreinterpretq_f32_s32(
                     vaddq_s32(vreinterpretq_s32_f32(x.v[i]),
                               vshlq_n_s32(vreinterpretq_s32_f32(shifted.v[i]), 23))));
    return x;
  }
  static float greatest(F x) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
  }
  static float sum(F x) {
    const float32x4_t four =
        vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  static void greatestOf8(const F (&x)[8], float* out) {
    for (int i = 0; i < 8; ++i) out[i] = greatest(x[i]);
  }
  static void sumOf8(const F (&x)[8], float* out) {
    for (int i = 0; i < 8; ++i) out[i] = sum(x[i]);
  }
  static void storeShorts(uint8_t* p, F x) {
    EARNEST_FOUR(const int16x4_t shorts = vmovn_s32(vcvtnq_s32_f32(x.v[i]));
                 vst1_u8(p + 8 * i, vreinterpret_u8_s16(shorts)));
  }

  struct Pairs { int16x4_t even[4], odd[4]; };
  struct Pair { int16x4_t even, odd; };
  static Pairs loadPairs(const uint8_t* p) {
    Pairs r;
    EARNEST_FOUR(
      const int32x4_t pair = vreinterpretq_s32_u8(vld1q_u8(p + 16 * i));
      r.even[i] = vmovn_s32(pair);
      r.odd[i] = vshrn_n_s32(pair, 16));
    return r;
  }
  static Pair broadcastPair(const uint8_t* p) {
    int16_t two[2];
    __builtin_memcpy(two, p, 4);
    return {vdup_n_s16(two[0]), vdup_n_s16(two[1])};
  }
  static I dotPairs(I sum, const Pairs& x, Pair pair) {
    EARNEST_FOUR(sum.v[i] = vmlal_s16(sum.v[i], x.even[i], pair.even);
                 sum.v[i] = vmlal_s16(sum.v[i], x.odd[i], pair.odd));
    return sum;
  }

  static A broadcast(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }

  static B loadB(const uint8_t* p) { B r; EARNEST_FOUR(r.v[i] = vld1q_u8(p + 16 * i)); return r; }
  static void storeB(uint8_t* p, B b) { EARNEST_FOUR(vst1q_u8(p + 16 * i, b.v[i])); }
  static void hold(B&) {}
  static B lowNibbles(B b) {
    EARNEST_FOUR(b.v[i] = vandq_u8(b.v[i], vdupq_n_u8(15)));
    return b;
  }
  static B highNibbles(B b) { EARNEST_FOUR(b.v[i] = vshrq_n_u8(b.v[i], 4)); return b; }
  static B flipSign(B b) {
    EARNEST_FOUR(b.v[i] = veorq_u8(b.v[i], vdupq_n_u8(0x80)));
    return b;
  }
  template <int kAt, int kWidth>
  static B withHigh(B b, B h) {
    const uint8x16_t mask = vdupq_n_u8(((1 << kWidth) - 1) << 4);
    EARNEST_FOUR(
      uint8x16_t moved = h.v[i];
      if constexpr (kAt < 4) moved = vshlq_n_u8(moved, 4 - kAt);
      if constexpr (kAt > 4) moved = vshrq_n_u8(moved, kAt - 4);
      b.v[i] = vorrq_u8(b.v[i], vandq_u8(moved, mask)));
    return b;
  }
  template <int kAt>
  static void sixBit(B low, B high, uint8_t* scales, uint8_t* minima) {
    storeB(scales, withHigh<kAt, 2>(lowNibbles(low), high));
    storeB(minima, withHigh<kAt + 2, 2>(highNibbles(low), high));
  }

  template <int kMax, bool kSigned, int kChains>
  struct Sum {
    I v = zeroI();
    template <int kGroup>
    void add(B w, A a) {
      EARNEST_FOUR(v.v[i] = vdotq_s32(v.v[i], vreinterpretq_s8_u8(w.v[i]), a));
    }
    I total() const { return v; }
  };

  static void storeHalves(uint8_t* p, F x) {
    EARNEST_FOUR(vst1_u8(p + 8 * i, vreinterpret_u8_f16(vcvt_f16_f32(x.v[i]))));
  }
#undef EARNEST_FOUR
};

}  // namespace
}  // namespace earnest
