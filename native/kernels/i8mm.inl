// Matrix products of several tokens with smmla, which multiplies 2 x 8 bytes by 8 x 2: twice the
// products of sdot. Same panels, same integers and same order of float32 operations as matmul.inl,
// so that prefill equals decode bit for bit.
//
// A vector of sums is [token 0: row 0, row 1; token 1: row 0, row 1]. The float sums stay in that
// order (scales are read as [row 0, row 1] twice and as [token 0] twice, [token 1] twice) and are
// put in order once, at the end. The upper plane of activations is multiplied first, its sums
// shifted, and the lower plane added on top: the integers are exact, so this is 128 hi + lo.
// Never timed; see docs/isa.md.
#pragma once

#include "kernels/panel_codecs.inl"

namespace earnest {

extern const KernelTable kNeonDotprod;  // for few tokens, and for plain codecs

namespace {

// From this many tokens on; below, writing the weights out again costs what smmla saves.
constexpr int64_t kMatrixTokens = 4;
constexpr int kPairs = 3;  // of tokens together, with 8 rows: 12 + 12 sums of 32 registers
// Blocks of 32 columns that all tokens go through before the next ones: 20 KB of weights, which
// the first cache keeps.
constexpr int64_t kDepth = 32;

// 2 tokens x 32 columns: integers [plane][k / 8][token][8], scales [token 0, 0, 1, 1], and so on.
template <int P>
struct Staged {
  int8_t values[P][4][16];
  float scale[4];
  float scaled_sum[4];
};
constexpr int64_t kStagedBytesMax = sizeof(Staged<2>);

// Sums of a pair of tokens, [8 pairs of rows][4].
constexpr int kSums = 32;

template <int P>
void stage(const Activations& x, Staged<P>* out) {
  const int64_t blocks = x.columns / kBlock;
  for (int64_t t = 0; t < x.tokens; t += 2) {
    const int8_t* values[2];
    const ActivationBlock* heads[2];
    for (int i = 0; i < 2; ++i) {
      const int64_t token = t + i < x.tokens ? t + i : t;  // an odd one keeps itself company
      const int64_t row = x.select ? x.select[token] : token;
      values[i] = x.values + row * x.columns * P;
      heads[i] = x.blocks + row * blocks;
    }
    for (int64_t b = 0; b < blocks; ++b, ++out) {
      for (int p = 0; p < P; ++p)
        for (int half = 0; half < 2; ++half) {
          const int64_t at = (b * P + p) * 32 + 16 * half;
          const int64x2_t first = vreinterpretq_s64_s8(vld1q_s8(values[0] + at));
          const int64x2_t second = vreinterpretq_s64_s8(vld1q_s8(values[1] + at));
          vst1q_s8(out->values[p][2 * half], vreinterpretq_s8_s64(vzip1q_s64(first, second)));
          vst1q_s8(out->values[p][2 * half + 1], vreinterpretq_s8_s64(vzip2q_s64(first, second)));
        }
      for (int i = 0; i < 4; ++i) {
        out->scale[i] = heads[i / 2][b].scale;
        out->scaled_sum[i] = heads[i / 2][b].scaled_sum;
      }
    }
  }
}

// How a panel is unpacked: q - offset, [k / 8][pair of rows][row][8].
template <class C>
struct RowPairs {
  static EARNEST_INLINE void store(uint8_t* out, Vec::B even, Vec::B odd) {
    const uint8x16_t offset = vdupq_n_u8(C::kOffset);
    for (int i = 0; i < 4; ++i) {
      const uint32x4_t a = vreinterpretq_u32_u8(vsubq_u8(even.v[i], offset));
      const uint32x4_t b = vreinterpretq_u32_u8(vsubq_u8(odd.v[i], offset));
      vst1q_u8(out + 32 * i, vreinterpretq_u8_u32(vzip1q_u32(a, b)));
      vst1q_u8(out + 32 * i + 16, vreinterpretq_u8_u32(vzip2q_u32(a, b)));
    }
  }
};

EARNEST_INLINE float32x4_t twice(const uint8_t* two_floats) {
  double both;
  __builtin_memcpy(&both, two_floats, 8);
  return vreinterpretq_f32_f64(vdupq_n_f64(both));
}

// gcc would load the next steps' bytes early, and then lack registers for the sums.
EARNEST_INLINE void loadsStayBehind() { __asm__ volatile("" : : : "memory"); }

// 8 rows x N pairs of tokens x `blocks`: `w` are the blocks, `half` says which 8 rows. What codecs
// differ in once they are unpacked: kParts scales, and minima if kMin.
template <int kParts, bool kMin, int P, int N>
__attribute__((noinline)) void tilePairs(const uint8_t* w, int half, int64_t blocks,
                                         const Staged<P>* x, int64_t x_stride, float* sums) {
  constexpr int kHeadBytes = 64 * (kParts + (kMin ? 1 : 0)), kBytes = kHeadBytes + 512;
  sums += 16 * half;
  float32x4_t acc[N][4];
  unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
    unroll<0, 4>([&](auto r) EARNEST_INLINE_LAMBDA {
      acc[n.value][r.value] = vld1q_f32(sums + kSums * n.value + 4 * r.value);
    });
  });
  const uint8_t* heads = w + 32 * half;
  const uint8_t* weights = w + kHeadBytes + 64 * half;
  for (int64_t b = 0; b < blocks; ++b, heads += kBytes, weights += kBytes, ++x) {
    unroll<0, kParts>([&](auto part) EARNEST_INLINE_LAMBDA {
      loadsStayBehind();
      int32x4_t total[N][4];
      unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
        unroll<0, 4>([&](auto r) EARNEST_INLINE_LAMBDA {
          total[n.value][r.value] = vdupq_n_s32(0);
        });
      });
      unroll<0, P>([&](auto p) EARNEST_INLINE_LAMBDA {
        if constexpr (p.value > 0) {
          unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
            unroll<0, 4>([&](auto r) EARNEST_INLINE_LAMBDA {
              total[n.value][r.value] = vshlq_n_s32(total[n.value][r.value], 7);
            });
          });
        }
        unroll<0, 4 / kParts>([&](auto i) EARNEST_INLINE_LAMBDA {
          loadsStayBehind();
          constexpr int j = part.value * (4 / kParts) + i.value;
          int8x16_t v[N];
          unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
            v[n.value] = vld1q_s8(x[n.value * x_stride].values[p.value][j]);
          });
          unroll<0, 4>([&](auto r) EARNEST_INLINE_LAMBDA {
            const int8x16_t rows =
                vreinterpretq_s8_u8(vld1q_u8(weights + 128 * j + 16 * r.value));
            unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
              int32x4_t& t = total[n.value][r.value];
              t = vmmlaq_s32(t, v[n.value], rows);
            });
          });
        });
      });
      unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
        const float32x4_t scale_x = vld1q_f32(x[n.value * x_stride].scale);
        unroll<0, 4>([&](auto r) EARNEST_INLINE_LAMBDA {
          const float32x4_t scale = twice(heads + 64 * part.value + 8 * r.value);
          float32x4_t& a = acc[n.value][r.value];
          a = vfmaq_f32(a, vcvtq_f32_s32(total[n.value][r.value]), vmulq_f32(scale, scale_x));
        });
      });
    });
    if constexpr (kMin) {
      unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
        const float32x4_t sum = vld1q_f32(x[n.value * x_stride].scaled_sum);
        unroll<0, 4>([&](auto r) EARNEST_INLINE_LAMBDA {
          float32x4_t& a = acc[n.value][r.value];
          a = vfmaq_f32(a, twice(heads + 64 * kParts + 8 * r.value), sum);
        });
      });
    }
  }
  unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
    unroll<0, 4>([&](auto r) EARNEST_INLINE_LAMBDA {
      vst1q_f32(sums + kSums * n.value + 4 * r.value, acc[n.value][r.value]);
    });
  });
}

// All pairs of tokens through some blocks of one panel, in tiles as equal as can be.
template <int kParts, bool kMin, int P>
void allPairs(const uint8_t* w, int64_t blocks, const Staged<P>* x, int64_t x_stride,
              int64_t pairs, float* sums) {
  for (int64_t tiles = (pairs + kPairs - 1) / kPairs; tiles > 0; --tiles) {
    const int64_t size = (pairs + tiles - 1) / tiles;
    for (int half = 0; half < 2; ++half) {
      if (size == 1) tilePairs<kParts, kMin, P, 1>(w, half, blocks, x, x_stride, sums);
      if (size == 2) tilePairs<kParts, kMin, P, 2>(w, half, blocks, x, x_stride, sums);
      if (size == 3) tilePairs<kParts, kMin, P, 3>(w, half, blocks, x, x_stride, sums);
    }
    x += size * x_stride;
    sums += size * kSums;
    pairs -= size;
  }
}

// From pairs of tokens and rows to the rows of every token.
void storePairs(const Matmul& m, int64_t panel, const float* sums) {
  const int64_t at = panel * kPanelRows, left = m.rows - at;
  const int64_t count = left < kPanelRows ? left : kPanelRows;
  for (int64_t t = 0; t < m.x.tokens; ++t) {
    const float* from = sums + t / 2 * kSums + t % 2 * 2;
    float* out = m.out + t * m.out_stride + at;
    for (int64_t r = 0; r < count; ++r) out[r] = from[r / 2 * 4 + r % 2];
  }
}

template <class C, int P>
void matmulPairs(const Matmul& m, int64_t begin, int64_t end, void* scratch) {
  using E = Expanded<C>;
  const int64_t blocks = m.columns / kBlock, pairs = (m.x.tokens + 1) / 2;
  uint8_t* expanded = static_cast<uint8_t*>(scratch);
  float* sums = reinterpret_cast<float*>(expanded + blocks * kExpandedBytesMax);
  auto* staged = reinterpret_cast<Staged<P>*>(sums + pairs * kSums);
  stage<P>(m.x, staged);
  for (int64_t p = begin; p < end; ++p) {
    expand<C, RowPairs<C>>(m.panels + p * (blocks / C::kRuns * C::kBytes), blocks, expanded);
    for (int64_t i = 0; i < pairs * kSums; ++i) sums[i] = 0.0f;
    for (int64_t b = 0; b < blocks; b += kDepth)
      allPairs<E::kParts, E::kMin, P>(expanded + b * E::kBytes,
                                      blocks - b < kDepth ? blocks - b : kDepth, staged + b, blocks,
                                      pairs, sums);
    storePairs(m, p, sums);
  }
}

template <class C>
void matmulPlanes(const Matmul& m, int64_t begin, int64_t end, void* scratch) {
  if (m.x.planes == kA15) {
    matmulPairs<C, 2>(m, begin, end, scratch);
  } else {
    matmulPairs<C, 1>(m, begin, end, scratch);
  }
}

void matmul(const Matmul& m, int64_t begin, int64_t end, void* scratch) {
  if (m.x.tokens < kMatrixTokens) return kNeonDotprod.matmul(m, begin, end, scratch);
  switch (m.codec) {
    case kQ8_0: return matmulPlanes<Q8_0>(m, begin, end, scratch);
    case kQ4_0: return matmulPlanes<Q4_0>(m, begin, end, scratch);
    case kQ4_1: return matmulPlanes<Q4_1>(m, begin, end, scratch);
    case kQ5_0: return matmulPlanes<Q5_0>(m, begin, end, scratch);
    case kQ5_1: return matmulPlanes<Q5_1>(m, begin, end, scratch);
    case kQ4_K: return matmulPlanes<Q4_K>(m, begin, end, scratch);
    case kQ5_K: return matmulPlanes<Q5_K>(m, begin, end, scratch);
    case kQ6_K: return matmulPlanes<Q6_K>(m, begin, end, scratch);
    default: return kNeonDotprod.matmul(m, begin, end, scratch);
  }
}

size_t scratchBytes(int64_t columns, int64_t tokens) {
  const int64_t blocks = columns / kBlock, pairs = (tokens + 1) / 2;
  const size_t many = static_cast<size_t>(blocks * kExpandedBytesMax + pairs * kSums * 4 +
                                          pairs * blocks * kStagedBytesMax);
  const size_t few = kNeonDotprod.scratchBytes(columns, tokens);
  return many > few ? many : few;
}

uint64_t peakPairs(uint64_t rounds) {
  constexpr int kChains = 16;
  alignas(16) int8_t bytes[8 * 16];
  for (int i = 0; i < 128; ++i) bytes[i] = static_cast<int8_t>(i * 7 & 15);
  __asm__ volatile("" : : "r"(bytes) : "memory");
  int32x4_t sum[kChains];
  int8x16_t v[8];
  for (int i = 0; i < 8; ++i) v[i] = vld1q_s8(bytes + 16 * i);
  for (int i = 0; i < kChains; ++i) sum[i] = vdupq_n_s32(i);
  for (uint64_t round = 0; round < rounds; ++round)
    unroll<0, kChains>([&](auto c) EARNEST_INLINE_LAMBDA {
      int32x4_t& s = sum[c.value];
      s = vmmlaq_s32(s, v[c.value % 4], v[4 + c.value / 4]);
    });
  int32x4_t total = sum[0];
  for (int i = 1; i < kChains; ++i) total = veorq_s32(total, sum[i]);
  volatile int32_t sink = vgetq_lane_s32(total, 0);
  (void)sink;
  return rounds * kChains * 32 * 2;
}

}  // namespace
}  // namespace earnest
