// Scores and sums of values over 16-bit keys and values, each position and head with a scale.
//
// Numbers that meet them become integers, 16 at a time, which share a scale: of a query channels
// 16 h .. 16 h + 15, of the weights of a block those of 16 neighbouring positions, after the values'
// scales have been multiplied in:
//   s_j = scale_k[j] * (chain of fma over h of float(sum over 16 channels of k u) * scale_q[h])
//   w_j = p_j * scale_v[j] ~ scale_w * u_j
//   o   = chain of fma over 16 positions each of float(sum over them of v_j u_j) * scale_w
// The scale is the least for which no integer needs more than 16 bits and all sums are exact: their
// sizes add up to 2^16 at most, so |sum| <= 32767 * 2^16 < 2^31. Positions that a query does not see
// have u = 0.
#pragma once

#include "kernels/pointwise.inl"

namespace earnest {
namespace {

constexpr float kShortMost = 32767.0f;
constexpr float kShortTotal = 65528.0f;  // and half for rounding each of 16

// `groups` (at most 8) of 16 numbers to integers, a group every `stride` bytes, and their scales: NaN
// if one of the 16 is not finite, 0 if all are nearly 0.
EARNEST_INLINE void toShorts(const float* x, int64_t groups, uint8_t* out, int64_t stride,
                             float* scales) {
  Vec::F all[8], sizes[8];
  unroll<0, 8>([&](auto g) EARNEST_INLINE_LAMBDA {
    all[g.value] = g.value < groups ? Vec::load(x + 16 * g.value) : Vec::zero();
    sizes[g.value] = Vec::magnitude(all[g.value]);
  });
  alignas(32) float most[8], total[8], inverse[8];
  Vec::greatestOf8(sizes, most);
  Vec::sumOf8(sizes, total);
  for (int g = 0; g < 8; ++g) {
    const float by_most = most[g] * (1.0f / kShortMost), by_total = total[g] * (1.0f / kShortTotal);
    const float scale = by_most > by_total ? by_most : by_total;
    const bool finite = total[g] < __builtin_inff(), good = finite && most[g] >= 0x1p-100f;
    inverse[g] = good ? 1.0f / scale : 0.0f;
    total[g] = good ? scale : finite ? 0.0f : __builtin_nanf("");
  }
  unroll<0, 8>([&](auto g) EARNEST_INLINE_LAMBDA {
    if (g.value >= groups) return;
    const Vec::F y = Vec::mul(all[g.value], Vec::set1(inverse[g.value]));
    Vec::storeShorts(out + stride * g.value, inverse[g.value] > 0 ? y : Vec::zero());
    scales[g.value] = total[g.value];
  });
}

// Most lines are fetched while products are computed, in the order in which they lie; every fourth of
// the values and every eighth of the keys later, while weights are: memory would have nothing to do
// then, and more to do at other times than it can.
constexpr int64_t kLaterValues = 4, kLaterKeys = 8;

constexpr bool isLater(int64_t line, int64_t every) { return line % every == every - 1; }

// Fetches the `part`-th of `parts` of such lines of a panel.
class FetchLater {
 public:
  FetchLater(const uint8_t* const* panels, int64_t lines, int64_t every, int part, int parts)
      : panels_(panels),
        from_(lines / every * part / parts),
        to_(lines / every * (part + 1) / parts),
        every_(every) {}
  EARNEST_INLINE void operator()(int64_t panel) const {
    for (int64_t i = from_; i < to_; ++i)
      __builtin_prefetch(panels_[panel] + kScaleBytes + 64 * (every_ * (i + 1) - 1), 0, 2);
  }

 private:
  const uint8_t* const* panels_;
  int64_t from_, to_, every_;
};

struct ShortKv {
  static constexpr int kQueries = Vec::kQueries;
  // Weights of a block, then their integers and the scales of these.
  static constexpr int64_t kWorkBytes = (4 + 2) * kQueries * kAttentionBlock + 4 * kQueries * kGroups;

  static int64_t runs(int64_t channels) { return (channels + 15) / 16; }
  static int64_t keyBytes(int64_t channels) { return kScaleBytes + 32 * channels; }
  static int64_t valueBytes(int64_t channels) {
    return kScaleBytes + 32 * paddedChannels(channels);
  }
  // Of 16 channels: the integers of all queries, then their scales.
  static constexpr int64_t kRunBytes = (32 + 4) * kQueries;
  static int64_t packedBytes(int64_t channels) { return kRunBytes * runs(channels); }

  static void pack(const float* const* q, int queries, int64_t channels, float scale,
                   uint8_t* packed) {
    for (int i = 0; i < queries; ++i)
      for (int64_t run = 0; run < runs(channels); run += 8) {
        alignas(64) float x[128];
        for (int64_t j = 0; j < 128; ++j)
          x[j] = 16 * run + j < channels ? q[i][16 * run + j] * scale : 0.0f;
        const int64_t count = runs(channels) - run < 8 ? runs(channels) - run : 8;
        uint8_t* out = packed + kRunBytes * run;
        float scales[8];
        toShorts(x, count, out + 32 * i, kRunBytes, scales);
        for (int64_t g = 0; g < count; ++g)
          __builtin_memcpy(out + kRunBytes * g + 32 * kQueries + 4 * i, scales + g, 4);
      }
  }

  // Q queries against N panels of 16 positions.
  template <int Q, int N>
  static EARNEST_INLINE void scoreTile(const uint8_t* const* panels, const uint8_t* const* fetch,
                                       const uint8_t* packed, int64_t channels, float* scores) {
    Vec::F score[Q][N];
    unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
      unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA { score[i.value][n.value] = Vec::zero(); });
    });
    const uint8_t *at[N], *ahead[N];
    for (int n = 0; n < N; ++n) at[n] = panels[n] + kScaleBytes, ahead[n] = fetch[n] + kScaleBytes;
    for (int n = 0; n < N; ++n) __builtin_prefetch(fetch[n], 0, 2);
    for (int64_t left = channels; left > 0; left -= 16, packed += kRunBytes) {
      Vec::I sum[Q][N];
      unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
        unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA { sum[i.value][n.value] = Vec::zeroI(); });
      });
      const uint8_t* u = packed;
      const int64_t bytes = 32 * (left < 16 ? left : 16);
      for (int64_t byte = 0; byte < bytes; byte += 64, u += 4) {
        Vec::Pairs k[N];
        unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
          k[n.value] = Vec::loadPairs(at[n.value] + byte);
          if (!isLater(byte / 64, kLaterValues)) __builtin_prefetch(ahead[n.value] + byte, 0, 2);
        });
        unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
          const auto pair = Vec::broadcastPair(u + 32 * i.value);
          unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
            Vec::I& s = sum[i.value][n.value];
            s = Vec::dotPairs(s, k[n.value], pair);
          });
        });
      }
      for (int n = 0; n < N; ++n) at[n] += bytes, ahead[n] += bytes;
      unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
        float by;
        __builtin_memcpy(&by, packed + 32 * kQueries + 4 * i.value, 4);
        const Vec::F scale = Vec::set1(by);
        unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
          Vec::F& s = score[i.value][n.value];
          s = Vec::fma(Vec::toFloat(sum[i.value][n.value]), scale, s);
        });
      });
    }
    unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
      unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
        const Vec::F by = Vec::load(reinterpret_cast<const float*>(panels[n.value]));
        Vec::store(scores + i.value * kAttentionBlock + 16 * n.value,
                   Vec::mul(score[i.value][n.value], by));
      });
    });
  }

  // S vectors of 16 channels from vector `run` of the values of `panels` times 16 positions.
  template <int Q, int S>
  static EARNEST_INLINE void valueTile(const Block& block, int64_t panels, int64_t padded,
                                       int64_t run, const uint8_t* integers, const float* scales,
                                       const float* corrections, float* states) {
    const int64_t row = 4 * padded, floats = padded + kState;  // bytes of two positions
    states += 16 * run;
    Vec::F o[Q][S];
    unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
      const Vec::F by = Vec::set1(corrections[i.value]);
      unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA {
        o[i.value][s.value] = Vec::mul(Vec::load(states + i.value * floats + 16 * s.value), by);
      });
    });
    for (int64_t g = 0; g < panels; ++g, integers += 32 * Q, scales += Q) {
      const uint8_t* at = block.values[g] + kScaleBytes + 64 * run;
      const uint8_t* ahead =
          kScaleBytes + keysAfter(block, 512 * (run * panels + g * S), 32 * padded);
      if (run == 0) __builtin_prefetch(block.fetch_keys[g], 0, 2);
      Vec::I sum[Q][S];
      unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
        unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA { sum[i.value][s.value] = Vec::zeroI(); });
      });
      for (int j = 0; j < 8; ++j, at += row, ahead += 64 * S) {
        Vec::Pairs v[S];
        unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA {
          v[s.value] = Vec::loadPairs(at + 64 * s.value);
          if (!isLater(S * j + s.value, kLaterKeys)) __builtin_prefetch(ahead + 64 * s.value, 0, 2);
        });
        unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
          const auto pair = Vec::broadcastPair(integers + 32 * i.value + 4 * j);
          unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA {
            Vec::I& t = sum[i.value][s.value];
            t = Vec::dotPairs(t, v[s.value], pair);
          });
        });
      }
      unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
        const Vec::F by = Vec::set1(scales[i.value]);
        unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA {
          Vec::F& t = o[i.value][s.value];
          t = Vec::fma(Vec::toFloat(sum[i.value][s.value]), by, t);
        });
      });
    }
    unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
      unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA {
        Vec::store(states + i.value * floats + 16 * s.value, o[i.value][s.value]);
      });
    });
  }

  template <int Q>
  __attribute__((noinline)) static void attend(const Block& block, const int64_t* seen,
                                               int64_t channels, const uint8_t* packed,
                                               float* states, uint8_t* work) {
    float* scores = reinterpret_cast<float*>(work);
    uint8_t* integers = work + 4 * Q * kAttentionBlock;
    float* scales = reinterpret_cast<float*>(work + 6 * Q * kAttentionBlock);
    const int64_t padded = paddedChannels(channels), floats = padded + kState;
    const int64_t panels = (seen[Q - 1] + 15) / 16;
    constexpr int N = beside(2 * Q);
    int64_t p = 0;
    for (; p + N <= panels; p += N)
      scoreTile<Q, N>(block.keys + p, block.fetch_values + p, packed, channels, scores + 16 * p);
    if constexpr (N > 1)
      for (; p < panels; ++p)
        scoreTile<Q, 1>(block.keys + p, block.fetch_values + p, packed, channels, scores + 16 * p);
    float corrections[Q];
    for (int i = 0; i < Q; ++i) {
      float* s = scores + i * kAttentionBlock;
      float* state = states + i * floats;
      const int64_t sees = seen[i] > 0 ? seen[i] : 0;
      corrections[i] = 1.0f;
      if (sees)
        corrections[i] = softmax(s, sees, state[padded], state[padded + 1],
                                 FetchLater(block.fetch_values, padded / 2, kLaterValues, i, Q));
      scaleWeights(s, (sees + 15) / 16, block,
                   FetchLater(block.fetch_keys, channels / 2, kLaterKeys, i, Q));
      for (int64_t j = sees; j < 16 * panels; ++j) s[j] = 0.0f;
      float by[kGroups];
      toShorts(s, panels, integers + 32 * i, 32 * Q, by);
      // Adding nothing must change nothing, not even the sign of a zero.
      for (int64_t g = 0; g < panels; ++g) scales[g * Q + i] = 16 * g < sees ? by[g] : -0.0f;
    }
    constexpr int S = beside(2 * Q) < 4 ? beside(2 * Q) : 4;
    int64_t run = 0;
    for (; run + S <= padded / 16; run += S)
      valueTile<Q, S>(block, panels, padded, run, integers, scales, corrections, states);
    if constexpr (S > 1)
      for (; run < padded / 16; ++run)
        valueTile<Q, 1>(block, panels, padded, run, integers, scales, corrections, states);
  }
};

}  // namespace
}  // namespace earnest
