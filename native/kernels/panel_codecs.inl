// How the kernels read each codec's panel blocks (docs/formats/panel.md), over the vector traits.
// Included by the tiers after a vec_*.h; everything is in an anonymous namespace.
//
// An integer codec C is a set of constants and three readers:
//   kCached             whether the blocks lie in cache already (no fetching ahead)
//   kBytes, kRuns       bytes of a block; runs of 32 columns in it (1, or 8 for K-quants)
//   kParts              scales per run of 32 (1, or 2 for q6_k)
//   kMax, kSigned       largest magnitude of a weight as the product sees it; whether it is signed
//   kOffset             to subtract from every weight
//   kMin                whether weights have a minimum: w = scale * q + minimum
//   Head                what is read once a block; scale(run, part) and minimum(run) of 16 rows
//   weights(block, run) where the run's weights lie
//   pair<j>(w, even, odd)  groups 2j and 2j + 1 of a run: columns 8j..8j+3 and 8j+4..8j+7
//   raisedPair<j>       the same with 16 times the odd group's weights (plain nibbles only)
#pragma once

#include "earnest/kernels.h"

namespace earnest {
namespace {

#define EARNEST_INLINE inline __attribute__((always_inline))
#define EARNEST_INLINE_LAMBDA __attribute__((always_inline))

constexpr int R = Vec::kPanels;

template <int kValue>
struct Index {
  static constexpr int value = kValue;
};

template <int kFrom, int kTo, class Body>
EARNEST_INLINE void unroll(Body&& body) {
  if constexpr (kFrom < kTo) {
    body(Index<kFrom>{});
    unroll<kFrom + 1, kTo>(body);
  }
}

// Nibbles, with `kBits - 4` planes of upper bits before them.
template <int kBits>
struct Bits {
  static constexpr int kMax = (1 << kBits) - 1;
  static constexpr bool kSigned = false;
  static constexpr int kRunBytes = 64 * kBits;
  template <int j, class V = Vec>
  static EARNEST_INLINE void pair(const uint8_t* w, Vec::B& even, Vec::B& odd) {
    constexpr int kPlanes = kBits - 4;
    Vec::B both = Vec::loadB(w + 64 * (kPlanes + j));
    Vec::hold(both);
    if constexpr (kPlanes == 2 && requires { V::template sixBits<0>(both, both, even, odd); })
      return V::template sixBits<4 * (j % 2)>(both, V::loadB(w + 64 * (j / 2)), even, odd);
    even = Vec::lowNibbles(both);
    odd = Vec::highNibbles(both);
    if constexpr (kPlanes > 0) {
      constexpr int kFields = 8 / kPlanes;  // groups that share a plane's 64 bytes
      const Vec::B high = Vec::loadB(w + 64 * (2 * j / kFields));
      even = Vec::withHigh<kPlanes * (2 * j % kFields), kPlanes>(even, high);
      odd = Vec::withHigh<kPlanes * ((2 * j + 1) % kFields), kPlanes>(odd, high);
    }
  }
  template <int j, class V = Vec>
    requires(kBits == 4) && requires(V::B b) { V::raisedNibbles(b); }
  static EARNEST_INLINE void raisedPair(const uint8_t* w, Vec::B& even, Vec::B& odd) {
    Vec::B both = Vec::loadB(w + 64 * j);
    Vec::hold(both);
    even = Vec::lowNibbles(both);
    odd = V::raisedNibbles(both);
  }
};

struct SignedBytes {
  static constexpr bool kSigned = Vec::kSignedOffset == 0;
  static constexpr int kMax = kSigned ? 128 : 255;
  static constexpr int kRunBytes = 512;
  template <int j>
  static EARNEST_INLINE void pair(const uint8_t* w, Vec::B& even, Vec::B& odd) {
    even = Vec::loadB(w + 128 * j);
    odd = Vec::loadB(w + 128 * j + 64);
    if constexpr (!kSigned) {
      even = Vec::flipSign(even);
      odd = Vec::flipSign(odd);
    }
  }
};

// A block of 32 columns: half-float scales, perhaps half-float minima, weights.
template <class Weights, int kTheOffset, bool kHasMin>
struct Legacy : Weights {
  static constexpr bool kCached = false;
  static constexpr int kOffset = kTheOffset, kRuns = 1, kParts = 1;
  static constexpr bool kMin = kHasMin;
  static constexpr int kHeadBytes = kHasMin ? 64 : 32;
  static constexpr int kBytes = kHeadBytes + Weights::kRunBytes;
  struct Head {
    const uint8_t* block;
    EARNEST_INLINE void load(const uint8_t* p) { block = p; }
    EARNEST_INLINE Vec::F scale(int, int) const { return Vec::halves(block); }
    EARNEST_INLINE Vec::F minimum(int) const { return Vec::halves(block + 32); }
  };
  static EARNEST_INLINE const uint8_t* weights(const uint8_t* block, int) {
    return block + kHeadBytes;
  }
};

// A block of 256 columns with 6-bit scales and minima: w = (d s) q - (m n).
template <int kBits>
struct SixBit : Bits<kBits> {
  static constexpr bool kCached = false;
  static constexpr int kOffset = 0, kRuns = 8, kParts = 1;
  static constexpr bool kMin = true;
  static constexpr int kBytes = 256 + 8 * Bits<kBits>::kRunBytes;
  struct Head {
    alignas(64) uint8_t scales[128], minima[128];
    Vec::F d, m;
    EARNEST_INLINE void load(const uint8_t* p) {
      d = Vec::halves(p);
      m = Vec::neg(Vec::halves(p + 32));
      const Vec::B high = Vec::loadB(p + 192);
      Vec::template sixBit<0>(Vec::loadB(p + 64), high, scales, minima);
      Vec::template sixBit<4>(Vec::loadB(p + 128), high, scales + 64, minima + 64);
    }
    EARNEST_INLINE Vec::F scale(int run, int) const {
      return Vec::mul(d, Vec::fromBytes(scales + 16 * run));
    }
    EARNEST_INLINE Vec::F minimum(int run) const {
      return Vec::mul(m, Vec::fromBytes(minima + 16 * run));
    }
  };
  static EARNEST_INLINE const uint8_t* weights(const uint8_t* block, int run) {
    return block + 256 + run * Bits<kBits>::kRunBytes;
  }
};

struct SixBitWeights : Bits<6> {
  static constexpr bool kCached = false;
  static constexpr int kOffset = 32, kRuns = 8, kParts = 2;
  static constexpr bool kMin = false;
  static constexpr int kBytes = 288 + 8 * kRunBytes;
  struct Head {
    alignas(64) uint8_t scales[256];
    Vec::F d;
    // All at once: who comes back to lines behind those it reads loses the processor's prefetchers.
    EARNEST_INLINE void load(const uint8_t* p) {
      d = Vec::halves(p);
      for (int i = 0; i < 4; ++i) Vec::storeB(scales + 64 * i, Vec::loadB(p + 32 + 64 * i));
    }
    EARNEST_INLINE Vec::F scale(int run, int part) const {
      return Vec::mul(d, Vec::fromSignedBytes(scales + 32 * run + 16 * part));
    }
    EARNEST_INLINE Vec::F minimum(int) const { return Vec::zero(); }
  };
  static EARNEST_INLINE const uint8_t* weights(const uint8_t* block, int run) {
    return block + 288 + run * kRunBytes;
  }
};

using Q8_0 = Legacy<SignedBytes, Vec::kSignedOffset, false>;
using Q4_0 = Legacy<Bits<4>, 8, false>;
using Q4_1 = Legacy<Bits<4>, 0, true>;
using Q5_0 = Legacy<Bits<5>, 16, false>;
using Q5_1 = Legacy<Bits<5>, 0, true>;
using Q4_K = SixBit<4>;
using Q5_K = SixBit<5>;
using Q6_K = SixBitWeights;

// A codec's blocks unpacked once for many tokens, in cache: per 32 columns float scales (and
// minima), then the weights as bytes, [k / 4][row][4].
template <class C>
struct Expanded {
  static constexpr bool kCached = true;
  static constexpr int kOffset = C::kOffset, kRuns = 1, kParts = C::kParts, kMax = C::kMax;
  static constexpr bool kMin = C::kMin, kSigned = C::kSigned;
  static constexpr int kHeadBytes = 64 * (kParts + (kMin ? 1 : 0));
  static constexpr int kBytes = kHeadBytes + 512;
  struct Head {
    const uint8_t* block;
    EARNEST_INLINE void load(const uint8_t* p) { block = p; }
    EARNEST_INLINE Vec::F scale(int, int part) const {
      return Vec::load(reinterpret_cast<const float*>(block + 64 * part));
    }
    EARNEST_INLINE Vec::F minimum(int) const {
      return Vec::load(reinterpret_cast<const float*>(block + 64 * kParts));
    }
  };
  static EARNEST_INLINE const uint8_t* weights(const uint8_t* block, int) {
    return block + kHeadBytes;
  }
  template <int j>
  static EARNEST_INLINE void pair(const uint8_t* w, Vec::B& even, Vec::B& odd) {
    even = Vec::loadB(w + 128 * j);
    odd = Vec::loadB(w + 128 * j + 64);
  }
};
constexpr int64_t kExpandedBytesMax = 512 + 128;  // per 32 columns of a panel

// How `expand` writes groups 2j and 2j + 1: one after the other.
struct GroupsInOrder {
  static EARNEST_INLINE void store(uint8_t* out, Vec::B even, Vec::B odd) {
    Vec::storeB(out, even);
    Vec::storeB(out + 64, odd);
  }
};

template <class C, class Order = GroupsInOrder>
void expand(const uint8_t* panel, int64_t blocks, uint8_t* out) {
  using E = Expanded<C>;
  for (int64_t at = 0; at < blocks; at += C::kRuns, panel += C::kBytes) {
    typename C::Head head;
    head.load(panel);
    for (int run = 0; run < C::kRuns; ++run, out += E::kBytes) {
      float* scales = reinterpret_cast<float*>(out);
      for (int part = 0; part < C::kParts; ++part)
        Vec::store(scales + 16 * part, head.scale(run, part));
      if constexpr (C::kMin) Vec::store(scales + 16 * C::kParts, head.minimum(run));
      const uint8_t* w = C::weights(panel, run);
      uint8_t* bytes = out + E::kHeadBytes;
      unroll<0, 4>([&](auto j) EARNEST_INLINE_LAMBDA {
        Vec::B even, odd;
        C::template pair<j.value>(w, even, odd);
        Order::store(bytes + 128 * j.value, even, odd);
      });
    }
  }
}

// Plain codecs: pair(w, j) reads columns 2j and 2j + 1 of 16 rows.
struct F32 {
  static constexpr bool kCached = false;
  static constexpr int kBytes = 2048, kRuns = 1;
  static EARNEST_INLINE void pair(const uint8_t* w, int j, Vec::F& even, Vec::F& odd) {
    even = Vec::load(reinterpret_cast<const float*>(w + 128 * j));
    odd = Vec::load(reinterpret_cast<const float*>(w + 128 * j + 64));
  }
};
struct F16 {
  static constexpr bool kCached = false;
  static constexpr int kBytes = 1024, kRuns = 1;
  static EARNEST_INLINE void pair(const uint8_t* w, int j, Vec::F& even, Vec::F& odd) {
    even = Vec::halves(w + 64 * j);
    odd = Vec::halves(w + 64 * j + 32);
  }
};
struct Bf16 {
  static constexpr bool kCached = false;
  static constexpr int kBytes = 1024, kRuns = 1;
  static EARNEST_INLINE void pair(const uint8_t* w, int j, Vec::F& even, Vec::F& odd) {
    Vec::bf16Pair(w + 64 * j, even, odd);
  }
};

}  // namespace
}  // namespace earnest
