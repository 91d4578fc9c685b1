// Matrix products of many tokens with AMX tiles: 16 (or the last 8) tokens x 16 rows x 32 columns
// at a time, from the same panels, the same integers and the same order of float32 operations as
// matmul.inl, so that prefill equals decode bit for bit.
//
// The tokens of a call are staged once (16 together: integers, scales), each panel is expanded once
// to signed bytes. A block's exact sums leave the tile for the float accumulators, which stay in
// registers: for 8192 products of one plane 16 cycles of the tile unit (a scale per 32 columns leaves
// half of a tile's depth empty) and about 24 of the vector units (convert, multiply, fma for 16
// rows), which bound this kernel. Never executed on hardware; see docs/isa.md.
#pragma once

#include "kernels/panel_codecs.inl"
#include "kernels/tiles.h"

namespace earnest {

extern const KernelTable kAvx512Vnni;  // for few tokens, and for f16 and f32

namespace {

// From this many tokens on: below, a tile of 8 would be mostly empty (not measured).
constexpr int64_t kTileTokens = 6;
constexpr int64_t kStagedBytesMax = 2 * 512 + 128;

// 16 tokens x 32 columns: integers [plane][token][32], then scales [token], scaled sums [token].
template <int P>
struct Staged {
  int8_t values[P][16][32];
  float scale[16];
  float scaled_sum[16];
};

EARNEST_INLINE int64_t rowOf(const Activations& x, int64_t token) {
  if (token >= x.tokens) token = x.tokens - 1;  // a partly filled tile repeats the last token
  return x.select ? x.select[token] : token;
}

template <int P>
void stage(const Activations& x, Staged<P>* out) {
  const int64_t blocks = x.columns / kBlock;
  for (int64_t begin = 0; begin < x.tokens; begin += 16, out += blocks)
    for (int t = 0; t < 16; ++t) {
      const int64_t row = rowOf(x, begin + t);
      const int8_t* values = x.values + row * x.columns * P;
      const ActivationBlock* heads = x.blocks + row * blocks;
      for (int64_t b = 0; b < blocks; ++b) {
        for (int p = 0; p < P; ++p)
          __builtin_memcpy(out[b].values[p][t], values + (b * P + p) * 32, 32);
        out[b].scale[t] = heads[b].scale;
        out[b].scaled_sum[t] = heads[b].scaled_sum;
      }
    }
}

// How a panel is unpacked: q - offset, signed.
template <class C>
struct SignedGroups {
  static EARNEST_INLINE void store(uint8_t* out, Vec::B even, Vec::B odd) {
    const __m512i offset = _mm512_set1_epi8(static_cast<int8_t>(C::kOffset));
    Vec::storeB(out, _mm512_sub_epi8(even, offset));
    Vec::storeB(out + 64, _mm512_sub_epi8(odd, offset));
  }
};

// Tiles: 0-3 sums (two blocks in flight x two planes), 4-5 activations, 6-7 weights.
void configure(int tokens, int parts) {
  TileConfig config;
  for (int i = 0; i < 4; ++i) config.rows[i] = tokens, config.columns[i] = 64;
  for (int i = 4; i < 6; ++i) config.rows[i] = tokens, config.columns[i] = 32 / parts;
  for (int i = 6; i < 8; ++i) config.rows[i] = 8 / parts, config.columns[i] = 64;
  tileConfigure(config);
}

// One panel x T tokens, 16 or 8. What codecs differ in once they are unpacked: kParts scales per 32
// columns, and minima if kMin.
template <int kParts, bool kMin, int P, int T>
__attribute__((noinline)) void tilePanel(const uint8_t* w, const Staged<P>* x, int64_t blocks,
                                         __m512* result) {
  constexpr int kColumns = 32 / kParts;
  constexpr int kHeadBytes = 64 * (kParts + (kMin ? 1 : 0)), kBytes = kHeadBytes + 512;
  alignas(64) int32_t sums[2][kParts][P][T][16];
  __m512 acc[T];
  for (int t = 0; t < T; ++t) acc[t] = _mm512_setzero_ps();

  auto multiply = [&](auto slot, int64_t b) EARNEST_INLINE_LAMBDA {
    const uint8_t* weights = w + b * kBytes + kHeadBytes;
    unroll<0, kParts>([&](auto part) EARNEST_INLINE_LAMBDA {
      constexpr int kWeights = 6 + slot.value;
      tileLoad<kWeights>(weights + 512 / kParts * part.value, 64);
      unroll<0, P>([&](auto p) EARNEST_INLINE_LAMBDA {
        constexpr int kSums = 2 * slot.value + p.value, kValues = 4 + slot.value;
        tileZero<kSums>();
        tileLoad<kValues>(&x[b].values[p.value][0][kColumns * part.value], 32);
        tileBytes<kSums, kValues, kWeights>();
        tileStore<kSums>(sums[slot.value][part.value][p.value], 64);
      });
    });
  };
  auto accumulate = [&](auto slot, int64_t b) EARNEST_INLINE_LAMBDA {
    const float* head = reinterpret_cast<const float*>(w + b * kBytes);
    unroll<0, kParts>([&](auto part) EARNEST_INLINE_LAMBDA {
      const __m512 scale = Vec::load(head + 16 * part.value);
      unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA {
        const auto& sum = sums[slot.value][part.value];
        __m512i total = _mm512_load_si512(sum[0][t.value]);
        if constexpr (P == 2)
          total = Vec::addI(Vec::shift7(total), _mm512_load_si512(sum[P - 1][t.value]));
        const __m512 both = Vec::mul(scale, Vec::set1(x[b].scale[t.value]));
        acc[t.value] = Vec::fma(Vec::toFloat(total), both, acc[t.value]);
      });
    });
    if constexpr (kMin) {
      const __m512 minimum = Vec::load(head + 16 * kParts);
      unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA {
        acc[t.value] = Vec::fma(minimum, Vec::set1(x[b].scaled_sum[t.value]), acc[t.value]);
      });
    }
  };

  int64_t b = 0;
  for (; b + 2 <= blocks; b += 2) {
    multiply(Index<0>{}, b);
    multiply(Index<1>{}, b + 1);
    accumulate(Index<0>{}, b);
    accumulate(Index<1>{}, b + 1);
  }
  if (b < blocks) {
    multiply(Index<0>{}, b);
    accumulate(Index<0>{}, b);
  }
  for (int t = 0; t < T; ++t) result[t] = acc[t];
}

EARNEST_INLINE void storeTokens(const Matmul& m, int64_t panel, int64_t begin,
                                const __m512* result) {
  for (int64_t t = 0; t < 16 && begin + t < m.x.tokens; ++t) {
    const int64_t left = m.rows - panel * kPanelRows;
    const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
    float* out = m.out + (begin + t) * m.out_stride + panel * kPanelRows;
    _mm512_mask_storeu_ps(out, mask, result[t]);
  }
}

template <class C, int P>
void matmulTiles(const Matmul& m, int64_t begin, int64_t end, void* scratch) {
  using E = Expanded<C>;
  const int64_t blocks = m.columns / kBlock;
  uint8_t* expanded = static_cast<uint8_t*>(scratch);
  auto* staged = reinterpret_cast<Staged<P>*>(expanded + blocks * kExpandedBytesMax);
  stage<P>(m.x, staged);

  // The last tokens, when they are 8 or fewer, take a tile of half the height and half the time.
  const int64_t last = m.x.tokens % 16;
  const bool small = last >= 1 && last <= 8;
  const int64_t full = m.x.tokens - (small ? last : 0);
  bool tall = full > 0;
  configure(tall ? 16 : 8, C::kParts);
  for (int64_t p = begin; p < end; ++p) {
    expand<C, SignedGroups<C>>(m.panels + p * (blocks / C::kRuns * C::kBytes), blocks, expanded);
    __m512 result[16];
    if (full > 0 && !tall) configure(16, C::kParts), tall = true;
    for (int64_t t = 0; t < full; t += 16) {
      tilePanel<E::kParts, E::kMin, P, 16>(expanded, staged + t / 16 * blocks, blocks, result);
      storeTokens(m, p, t, result);
    }
    if (small) {
      if (tall) configure(8, C::kParts), tall = false;
      tilePanel<E::kParts, E::kMin, P, 8>(expanded, staged + full / 16 * blocks, blocks, result);
      storeTokens(m, p, full, result);
    }
  }
  tileRelease();
}

// bf16: the panel's own bytes are the tile. Two panels x two groups of 16 tokens, all of K inside
// the tiles: the instruction's order of sums is the one that matmul.inl spells out.
void matmulBf16Tiles(const Matmul& m, int64_t begin, int64_t end, void* scratch) {
  const int64_t blocks = m.columns / kBlock, groups = (m.x.tokens + 15) / 16;
  uint16_t* staged = static_cast<uint16_t*>(scratch);  // [group][block][16][32]
  for (int64_t g = 0; g < groups; ++g)
    for (int t = 0; t < 16; ++t) {
      const float* x = m.x.floats + rowOf(m.x, 16 * g + t) * m.columns;
      for (int64_t b = 0; b < blocks; ++b) {
        uint16_t* out = staged + ((g * blocks + b) * 16 + t) * 32;
        for (int i = 0; i < 32; ++i) {
          uint32_t bits;
          __builtin_memcpy(&bits, x + 32 * b + i, 4);
          out[i] = static_cast<uint16_t>(bits >> 16);  // `prepare` has rounded
        }
      }
    }
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.rows[i] = 16, config.columns[i] = 64;
  tileConfigure(config);
  const int64_t bytes = blocks * 1024;
  for (int64_t p = begin; p < end; p += 2) {
    const int64_t q = p + 1 < end ? p + 1 : p;
    const uint8_t *w0 = m.panels + p * bytes, *w1 = m.panels + q * bytes;
    for (int64_t g = 0; g < groups; g += 2) {
      const int64_t h = g + 1 < groups ? g + 1 : g;
      const uint16_t *x0 = staged + g * blocks * 512, *x1 = staged + h * blocks * 512;
      tileZero<0>(), tileZero<1>(), tileZero<2>(), tileZero<3>();
      for (int64_t b = 0; b < blocks; ++b) {
        tileLoad<4>(x0 + b * 512, 64);
        tileLoad<6>(w0 + b * 1024, 64);
        tileLoad<7>(w1 + b * 1024, 64);
        tileBf16<0, 4, 6>();
        tileBf16<1, 4, 7>();
        if (h == g) continue;
        tileLoad<5>(x1 + b * 512, 64);
        tileBf16<2, 5, 6>();
        tileBf16<3, 5, 7>();
      }
      alignas(64) __m512 result[4][16];
      tileStore<0>(result[0], 64);
      tileStore<1>(result[1], 64);
      tileStore<2>(result[2], 64);
      tileStore<3>(result[3], 64);
      storeTokens(m, p, 16 * g, result[0]);
      storeTokens(m, q, 16 * g, result[1]);
      if (h == g) continue;
      storeTokens(m, p, 16 * h, result[2]);
      storeTokens(m, q, 16 * h, result[3]);
    }
  }
  tileRelease();
}

template <class C>
void matmulPlanes(const Matmul& m, int64_t begin, int64_t end, void* scratch) {
  if (m.x.planes == kA15) {
    matmulTiles<C, 2>(m, begin, end, scratch);
  } else {
    matmulTiles<C, 1>(m, begin, end, scratch);
  }
}

void matmul(const Matmul& m, int64_t begin, int64_t end, void* scratch) {
  if (begin >= end) return;
  if (m.x.tokens < kTileTokens) return kAvx512Vnni.matmul(m, begin, end, scratch);
  switch (m.codec) {
    case kBf16: return matmulBf16Tiles(m, begin, end, scratch);
    case kQ8_0: return matmulPlanes<Q8_0>(m, begin, end, scratch);
    case kQ4_0: return matmulPlanes<Q4_0>(m, begin, end, scratch);
    case kQ4_1: return matmulPlanes<Q4_1>(m, begin, end, scratch);
    case kQ5_0: return matmulPlanes<Q5_0>(m, begin, end, scratch);
    case kQ5_1: return matmulPlanes<Q5_1>(m, begin, end, scratch);
    case kQ4_K: return matmulPlanes<Q4_K>(m, begin, end, scratch);
    case kQ5_K: return matmulPlanes<Q5_K>(m, begin, end, scratch);
    case kQ6_K: return matmulPlanes<Q6_K>(m, begin, end, scratch);
    default: return kAvx512Vnni.matmul(m, begin, end, scratch);
  }
}

size_t scratchBytes(int64_t columns, int64_t tokens) {
  const size_t tiles = static_cast<size_t>((columns / kBlock) * kExpandedBytesMax +
                                           (tokens + 15) / 16 * (columns / kBlock) *
                                               kStagedBytesMax);
  const size_t few = kAvx512Vnni.scratchBytes(columns, tokens);
  return tiles > few ? tiles : few;
}

uint64_t peakTiles(uint64_t rounds) {
  alignas(64) uint8_t bytes[1024];
  for (int i = 0; i < 1024; ++i) bytes[i] = static_cast<uint8_t>(i & 15);
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.rows[i] = 16, config.columns[i] = 64;
  tileConfigure(config);
  tileLoad<4>(bytes, 64), tileLoad<5>(bytes, 64), tileLoad<6>(bytes, 64), tileLoad<7>(bytes, 64);
  for (uint64_t i = 0; i < rounds; ++i) {
    tileBytes<0, 4, 6>();
    tileBytes<1, 4, 7>();
    tileBytes<2, 5, 6>();
    tileBytes<3, 5, 7>();
  }
  alignas(64) int32_t out[16][16];
  tileStore<0>(out, 64);
  volatile int32_t sink = out[0][0];
  (void)sink;
  tileRelease();
  return rounds * 4 * 16 * 16 * 64 * 2;
}

}  // namespace
}  // namespace earnest
