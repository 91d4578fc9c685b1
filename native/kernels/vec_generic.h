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

struct Vec {
  // Panels and tokens worked on together: as many accumulators as the registers hold.
  static constexpr int kPanels = 1, kTokens = 4, kFloatTokens = 4;
  // What is added to signed weights so that the tier's byte product takes them (0 or 128).
  static constexpr int kSignedOffset = 0;

  struct F { float v[16]; };
  struct I { int32_t v[16]; };
  struct B { uint8_t v[64]; };
  struct A { int8_t v[4]; };

  static float halfToFloat(uint16_t h) {
    const uint32_t sign = uint32_t{h & 0x8000u} << 16;
    const uint32_t magnitude = h & 0x7fffu;
    uint32_t bits;
    if (magnitude >= 0x7c00) {
      bits = 0x7f800000u | (magnitude & 0x3ff) << 13;
    } else if (magnitude >= 0x400) {
      bits = (magnitude + ((127 - 15) << 10)) << 13;
    } else {  // subnormal: magnitude * 2^-24 is exact
      const float f = static_cast<float>(magnitude) * 0x1p-24f;
      __builtin_memcpy(&bits, &f, 4);
    }
    bits |= sign;
    float out;
    __builtin_memcpy(&out, &bits, 4);
    return out;
  }

#define EARNEST_LANES for (int i = 0; i < 16; ++i)
  static F zero() { return F{}; }
  static F set1(float x) { F r; EARNEST_LANES r.v[i] = x; return r; }
  static F load(const float* p) { F r; EARNEST_LANES r.v[i] = p[i]; return r; }
  static void store(float* p, F x) { EARNEST_LANES p[i] = x.v[i]; }
  static F add(F a, F b) { EARNEST_LANES a.v[i] += b.v[i]; return a; }
  static F mul(F a, F b) { EARNEST_LANES a.v[i] *= b.v[i]; return a; }
  static F neg(F a) { EARNEST_LANES a.v[i] = -a.v[i]; return a; }
  static F fma(F a, F b, F c) { EARNEST_LANES c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]); return c; }
  static F halves(const uint8_t* p) {
    F r;
    EARNEST_LANES {
      uint16_t h;
      __builtin_memcpy(&h, p + 2 * i, 2);
      r.v[i] = halfToFloat(h);
    }
    return r;
  }
  static F fromBytes(const uint8_t* p) { F r; EARNEST_LANES r.v[i] = p[i]; return r; }
  static F fromSignedBytes(const uint8_t* p) {
    F r;
    EARNEST_LANES r.v[i] = static_cast<int8_t>(p[i]);
    return r;
  }
  // Pairs of bf16, [row][2], to the even and the odd column.
  static void bf16Pair(const uint8_t* p, F& even, F& odd) {
    EARNEST_LANES {
      uint32_t pair;
      __builtin_memcpy(&pair, p + 4 * i, 4);
      const uint32_t low = pair << 16, high = pair & 0xffff0000u;
      __builtin_memcpy(&even.v[i], &low, 4);
      __builtin_memcpy(&odd.v[i], &high, 4);
    }
  }

  static I zeroI() { return I{}; }
  static I set1I(int32_t x) { I r; EARNEST_LANES r.v[i] = x; return r; }
  static I addI(I a, I b) { EARNEST_LANES a.v[i] += b.v[i]; return a; }
  static I shift7(I a) { EARNEST_LANES a.v[i] *= 128; return a; }
  static F toFloat(I a) { F r; EARNEST_LANES r.v[i] = static_cast<float>(a.v[i]); return r; }

  static A broadcast(const int8_t* p) { A r; __builtin_memcpy(r.v, p, 4); return r; }

#define EARNEST_BYTES for (int i = 0; i < 64; ++i)
  static B loadB(const uint8_t* p) { B r; __builtin_memcpy(r.v, p, 64); return r; }
  static void storeB(uint8_t* p, B b) { __builtin_memcpy(p, b.v, 64); }
  static B lowNibbles(B b) { EARNEST_BYTES b.v[i] &= 15; return b; }
  static B highNibbles(B b) { EARNEST_BYTES b.v[i] >>= 4; return b; }
  static B flipSign(B b) { EARNEST_BYTES b.v[i] ^= 0x80; return b; }
  // b | (field `at` of width bits of h) << 4
  template <int kAt, int kWidth>
  static B withHigh(B b, B h) {
    EARNEST_BYTES b.v[i] |= static_cast<uint8_t>((h.v[i] >> kAt & ((1 << kWidth) - 1)) << 4);
    return b;
  }
  // Six-bit scales and minima of 4 runs from their nibbles and upper bits (docs/formats/panel.md).
  template <int kAt>
  static void sixBit(B low, B high, uint8_t* scales, uint8_t* minima) {
    EARNEST_BYTES {
      scales[i] = static_cast<uint8_t>((low.v[i] & 15) | (high.v[i] >> kAt & 3) << 4);
      minima[i] = static_cast<uint8_t>((low.v[i] >> 4) | (high.v[i] >> (kAt + 2) & 3) << 4);
    }
  }

  // Exact integer sum over groups of 4 columns. Weights are at most kMax, and signed if kSigned.
  template <int kMax, bool kSigned>
  struct Sum {
    I v = {};
    template <int kGroup>
    void add(B w, A a) {
      EARNEST_LANES for (int j = 0; j < 4; ++j) {
        const int32_t x = kSigned ? static_cast<int8_t>(w.v[4 * i + j]) : w.v[4 * i + j];
        v.v[i] += x * a.v[j];
      }
    }
    I total() const { return v; }
  };
#undef EARNEST_BYTES
#undef EARNEST_LANES
};

}  // namespace
}  // namespace earnest
