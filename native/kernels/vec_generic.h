// The vector traits, spelled out in plain C++: what every other tier's header must provide.
//
// A vector has 16 lanes and a lane is an output row of a panel.
//   F  16 floats          I  16 int32          B  64 bytes: 4 neighbouring columns of 16 rows
//   A  4 activations (int8), the same for every lane
#pragma once

#include <cstddef>
#include <cstdint>

namespace earnest {
namespace {

// The compiler's own vectors: they become whatever registers the target has, and are one operation
// each while optimising (loops over lanes would take minutes to compile).
using F = float __attribute__((vector_size(64)));
using I = int32_t __attribute__((vector_size(64)));
using B = uint8_t __attribute__((vector_size(64)));
using Shorts = int16_t __attribute__((vector_size(64)));
using UnsignedShorts = uint16_t __attribute__((vector_size(64)));

struct Vec {
  // Queries that attention works on together, and accumulators that the registers hold beside what
  // they meet.
  static constexpr int kQueries = 1, kAccumulators = 1;
  // Panels and tokens worked on together: as many accumulators as the registers hold. kTokens with
  // one plane of activations, with two. Up to kUnexpanded tokens, reading a panel's own blocks for
  // every tile costs less than writing them out as bytes first.
  static constexpr int kPanels = 1, kTokens[] = {2, 2}, kFloatTokens = 2, kUnexpanded = 2;
  // What is added to signed weights so that the tier's byte product takes them (0 or 128).
  static constexpr int kSignedOffset = 0;

  using F = earnest::F;
  using I = earnest::I;
  using B = earnest::B;
  struct A { Shorts even, odd; };

  template <class T>
  static T loadAs(const void* p) {
    T x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }

  static F zero() { return F{}; }
  static F set1(float x) { return F{} + x; }
  static F load(const float* p) { return loadAs<F>(p); }
  static void store(float* p, F x) { __builtin_memcpy(p, &x, 64); }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  static F neg(F a) { return -a; }
  __attribute__((noinline)) static F fma(F a, F b, F c) {
    for (int i = 0; i < 16; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
  }
  // Half floats: a normal one moves to float32's place for exponent and mantissa and gets the
  // difference of the biases; below, the value is the integer times 2^-24; above, infinity or NaN.
  __attribute__((noinline)) static F halves(const uint8_t* p) {
    I h;
    for (int i = 0; i < 16; ++i) h[i] = p[2 * i] | p[2 * i + 1] << 8;
    const I magnitude = h & 0x7fff, sign = (h & 0x8000) << 16;
    const I normal = (magnitude + ((127 - 15) << 10)) << 13;
    const I small = reinterpret_cast<I>(__builtin_convertvector(magnitude, F) * 0x1p-24f);
    const I huge = (magnitude << 13) | 0x7f800000;
    const I bits = magnitude < 0x400 ? small : magnitude < 0x7c00 ? normal : huge;
    return reinterpret_cast<F>(bits | sign);
  }
  __attribute__((noinline)) static F fromBytes(const uint8_t* p) {
    F r;
    for (int i = 0; i < 16; ++i) r[i] = p[i];
    return r;
  }
  __attribute__((noinline)) static F fromSignedBytes(const uint8_t* p) {
    F r;
    for (int i = 0; i < 16; ++i) r[i] = static_cast<int8_t>(p[i]);
    return r;
  }
  // Pairs of bf16, [row][2], to the even and the odd column.
  static void bf16Pair(const uint8_t* p, F& even, F& odd) {
    const I pair = loadAs<I>(p);
    even = reinterpret_cast<F>(pair << 16);
    odd = reinterpret_cast<F>(pair & int32_t(0xffff0000));
  }

  static I zeroI() { return I{}; }
  static I set1I(int32_t x) { return I{} + x; }
  static I addI(I a, I b) { return a + b; }
  static I shift7(I a) { return a << 7; }
  static F toFloat(I a) { return __builtin_convertvector(a, F); }

  static F magnitude(F a) { return reinterpret_cast<F>(reinterpret_cast<I>(a) & 0x7fffffff); }
  // The second one where one of them is NaN.
  static F greater(F a, F b) { return a > b ? a : b; }
  // `value`, but 0 where x is less than `least`.
  static F zeroBelow(F x, F least, F value) { return x < least ? F{} : value; }
  // x times 2^n, where n + 1.5 * 2^23 is given and the result is a normal number.
  static F timesPower(F x, F shifted) {
    return reinterpret_cast<F>(reinterpret_cast<I>(x) + (reinterpret_cast<I>(shifted) << 23));
  }
  // The largest lane, where none is NaN; the sum over a fixed tree: lanes 8 apart, then 4, 2, 1.
  __attribute__((noinline)) static float greatest(F a) {
    float most = a[0];
    for (int i = 1; i < 16; ++i) most = a[i] > most ? a[i] : most;
    return most;
  }
  __attribute__((noinline)) static float sum(F a) {
    for (int half = 8; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) a[i] += a[i + half];
    return a[0];
  }
  // The same of 8 vectors, with the same tree.
  static void greatestOf8(const F (&x)[8], float* out) {
    for (int i = 0; i < 8; ++i) out[i] = greatest(x[i]);
  }
  static void sumOf8(const F (&x)[8], float* out) {
    for (int i = 0; i < 8; ++i) out[i] = sum(x[i]);
  }
  // To the nearest 16-bit integers, ties to even: adding 1.5 * 2^23 leaves them in the lowest bits.
  static void storeShorts(uint8_t* p, F a) {
    const I bits = reinterpret_cast<I>(a + 12582912.0f) - 0x4b400000;
    using Halves = int16_t __attribute__((vector_size(32)));
    const Halves halves = __builtin_convertvector(bits, Halves);
    __builtin_memcpy(p, &halves, 32);
  }

  // Pairs of 16-bit integers of 16 rows, [row][2], times a pair that is the same for every row.
  struct Pairs { I even, odd; };
  struct Pair { int32_t even, odd; };
  static Pairs loadPairs(const uint8_t* p) {
    const I pair = loadAs<I>(p);
    return {pair << 16 >> 16, pair >> 16};
  }
  static Pair broadcastPair(const uint8_t* p) {
    const int32_t pair = loadAs<int32_t>(p);
    return {static_cast<int16_t>(pair), pair >> 16};
  }
  static I dotPairs(I sum, const Pairs& x, Pair pair) {
    return sum + x.even * pair.even + x.odd * pair.odd;
  }

  // 4 activations as 16-bit factors for the even and the odd bytes of every lane.
  static A broadcast(const int8_t* p) {
    const I even = I{} + int32_t(uint32_t(uint16_t(p[0])) | uint32_t(uint16_t(p[2])) << 16);
    const I odd = I{} + int32_t(uint32_t(uint16_t(p[1])) | uint32_t(uint16_t(p[3])) << 16);
    return {reinterpret_cast<Shorts>(even), reinterpret_cast<Shorts>(odd)};
  }

  static B loadB(const uint8_t* p) { return loadAs<B>(p); }
  static void storeB(uint8_t* p, B b) { __builtin_memcpy(p, &b, 64); }
  static void hold(B&) {}
  static B lowNibbles(B b) { return b & 15; }
  static B highNibbles(B b) { return b >> 4; }
  static B flipSign(B b) { return b ^ 0x80; }
  // b | (field `at` of width bits of h) << 4
  template <int kAt, int kWidth>
  static B withHigh(B b, B h) {
    constexpr uint8_t kMask = (1 << kWidth) - 1;
    return b | ((h >> kAt) & kMask) << 4;
  }
  // Six-bit scales and minima of 4 runs from their nibbles and upper bits (docs/formats/panel.md).
  template <int kAt>
  static void sixBit(B low, B high, uint8_t* scales, uint8_t* minima) {
    storeB(scales, withHigh<kAt, 2>(lowNibbles(low), high));
    storeB(minima, withHigh<kAt + 2, 2>(highNibbles(low), high));
  }

  // Exact integer sum over groups of 4 columns. Weights are at most kMax, and signed if kSigned.
  // kChains = 2 asks for two accumulators, where a product would wait for the one before it.
  // A product fits 16 bits: 255 * 127 = 32385.
  template <int kMax, bool kSigned, int kChains>
  struct Sum {
    I v = {};
    static I pairs(Shorts product) {
      const I both = reinterpret_cast<I>(product);
      return (both << 16 >> 16) + (both >> 16);
    }
    template <int kGroup>
    void add(B w, const A& a) {
      const Shorts bytes = reinterpret_cast<Shorts>(w);
      Shorts even, odd;
      if constexpr (kSigned) {
        even = bytes << 8 >> 8;
        odd = bytes >> 8;
      } else {
        even = bytes & 255;
        odd = reinterpret_cast<Shorts>(reinterpret_cast<UnsignedShorts>(w) >> 8);
      }
      v += pairs(even * a.even) + pairs(odd * a.odd);
    }
    I total() const { return v; }
  };

  // To half floats, ties to even. Below 2^-14 a half is an integer times 2^-24, which is the last
  // place of floats from 0.5 to 1.
  __attribute__((noinline)) static void storeHalves(uint8_t* p, F x) {
    for (int i = 0; i < 16; ++i) {
      const float value = x[i];
      uint32_t bits;
      __builtin_memcpy(&bits, &value, 4);
      const uint32_t magnitude = bits & 0x7fffffffu;
      uint32_t half;
      if (magnitude > 0x7f800000u) {
        half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
      } else if (magnitude >= 0x477ff000u) {
        half = 0x7c00u;
      } else if (magnitude < 0x38800000u) {
        const float moved = __builtin_fabsf(value) + 0.5f;
        __builtin_memcpy(&half, &moved, 4);
        half -= 0x3f000000u;
      } else {
        half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
      }
      half |= bits >> 16 & 0x8000u;
      p[2 * i] = static_cast<uint8_t>(half);
      p[2 * i + 1] = static_cast<uint8_t>(half >> 8);
    }
  }
};

}  // namespace
}  // namespace earnest
