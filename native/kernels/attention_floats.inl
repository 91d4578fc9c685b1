// Scores and sums of values over f32, f16 and bf16: every sum is one chain of fma, over channels or
// positions in order.
#pragma once

#include "kernels/pointwise.inl"

namespace earnest {
namespace {

struct KvF32 : F32 {
  static constexpr int kNumber = 4;
};
struct KvF16 : F16 {
  static constexpr int kNumber = 2;
};
struct KvBf16 : Bf16 {
  static constexpr int kNumber = 2;
};

// Q queries, packed as [channel][Q], against N panels of 16 positions.
template <class C, int Q, int N>
EARNEST_INLINE void scoreTile(const uint8_t* const* panels, const uint8_t* const* fetch,
                              const float* q, int64_t channels, float* scores) {
  Vec::F sum[Q][N];
  unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
    unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA { sum[i.value][n.value] = Vec::zero(); });
  });
  const uint8_t *at[N], *ahead[N];
  for (int n = 0; n < N; ++n) at[n] = panels[n], ahead[n] = fetch[n];
  constexpr int kPair = 32 * C::kNumber;  // bytes of two channels of a panel
  const int64_t bytes = channels / 2 * kPair;
  for (int64_t byte = 0; byte < bytes; byte += kPair, q += 2 * Q) {
    Vec::F k0[N], k1[N];
    unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
      C::pair(at[n.value] + byte, 0, k0[n.value], k1[n.value]);
      for (int line = 0; line < kPair; line += 64)
        __builtin_prefetch(ahead[n.value] + byte + line, 0, 2);
    });
    unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
      const Vec::F q0 = Vec::set1(q[i.value]);
      unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
        sum[i.value][n.value] = Vec::fma(k0[n.value], q0, sum[i.value][n.value]);
      });
    });
    unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
      const Vec::F q1 = Vec::set1(q[Q + i.value]);
      unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
        sum[i.value][n.value] = Vec::fma(k1[n.value], q1, sum[i.value][n.value]);
      });
    });
  }
  unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
    unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
      Vec::store(scores + i.value * kAttentionBlock + 16 * n.value, sum[i.value][n.value]);
    });
  });
}

// The values of positions [from, to) of a block into Q states, S runs of 32 channels from run `run`.
template <class C, int Q, int S, bool kFetch>
EARNEST_INLINE void valueTile(const Block& block, int64_t from, int64_t to, int64_t padded,
                              int64_t run, const float* weights, float* states) {
  const int64_t floats = padded + kState, row_bytes = padded * C::kNumber;
  constexpr int kRun = 32 * C::kNumber;
  states += 32 * run;
  Vec::F even[Q][S], odd[Q][S];
  unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
    unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA {
      const float* o = states + i.value * floats + 32 * s.value;
      even[i.value][s.value] = Vec::load(o);
      odd[i.value][s.value] = Vec::load(o + 16);
    });
  });
  for (int64_t j = from; j < to;) {
    const int64_t group = j / 16, within = j % 16 * row_bytes + run * kRun;
    const uint8_t* row = block.values[group] + within;
    const uint8_t* ahead = block.fetch_keys[group] + within;
    const int64_t end = to < 16 * (group + 1) ? to : 16 * (group + 1);
    for (; j < end; ++j, row += row_bytes, ahead += row_bytes) {
      Vec::F v0[S], v1[S];
      unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA {
        C::pair(row + s.value * kRun, 0, v0[s.value], v1[s.value]);
        if constexpr (kFetch)
          for (int line = 0; line < kRun; line += 64)
            __builtin_prefetch(ahead + s.value * kRun + line, 0, 2);
      });
      unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
        const Vec::F p = Vec::set1(weights[i.value * kAttentionBlock + j]);
        unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA {
          even[i.value][s.value] = Vec::fma(v0[s.value], p, even[i.value][s.value]);
          odd[i.value][s.value] = Vec::fma(v1[s.value], p, odd[i.value][s.value]);
        });
      });
    }
  }
  unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
    unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA {
      float* o = states + i.value * floats + 32 * s.value;
      Vec::store(o, even[i.value][s.value]);
      Vec::store(o + 16, odd[i.value][s.value]);
    });
  });
}

template <class C, int Q, bool kFetch>
EARNEST_INLINE void valueTiles(const Block& block, int64_t from, int64_t to, int64_t padded,
                               const float* weights, float* states) {
  constexpr int kTogether = beside(2 * Q) < 4 ? beside(2 * Q) : 4;
  int64_t run = 0;
  for (; run + kTogether <= padded / 32; run += kTogether)
    valueTile<C, Q, kTogether, kFetch>(block, from, to, padded, run, weights, states);
  if constexpr (kTogether > 1)
    for (; run < padded / 32; ++run)
      valueTile<C, Q, 1, kFetch>(block, from, to, padded, run, weights, states);
}

template <class C>
struct FloatKv {
  static constexpr int kQueries = Vec::kQueries;
  static constexpr int64_t kWorkBytes = 4 * kQueries * kAttentionBlock;

  static int64_t keyBytes(int64_t channels) { return 16 * C::kNumber * channels; }
  static int64_t valueBytes(int64_t channels) {
    return 16 * C::kNumber * paddedChannels(channels);
  }
  static int64_t packedBytes(int64_t channels) { return 4 * kQueries * ((channels + 15) / 16 * 16); }

  static void pack(const float* const* q, int queries, int64_t channels, float scale,
                   uint8_t* packed) {
    float* out = reinterpret_cast<float*>(packed);
    for (int i = 0; i < queries; ++i)
      for (int64_t c = 0; c < channels; ++c) out[c * queries + i] = q[i][c] * scale;
  }

  template <int Q>
  __attribute__((noinline)) static void attend(const Block& block, const int64_t* seen,
                                               int64_t channels, const uint8_t* packed,
                                               float* states, uint8_t* work) {
    const float* q = reinterpret_cast<const float*>(packed);
    float* scores = reinterpret_cast<float*>(work);
    const int64_t padded = paddedChannels(channels), floats = padded + kState;
    const int64_t panels = (seen[Q - 1] + 15) / 16;
    constexpr int N = beside(Q);
    int64_t p = 0;
    for (; p + N <= panels; p += N)
      scoreTile<C, Q, N>(block.keys + p, block.fetch_values + p, q, channels, scores + 16 * p);
    if constexpr (N > 1)
      for (; p < panels; ++p)
        scoreTile<C, Q, 1>(block.keys + p, block.fetch_values + p, q, channels, scores + 16 * p);
    for (int i = 0; i < Q; ++i) {
      if (seen[i] <= 0) continue;
      float* state = states + i * floats;
      const float by = softmax(scores + i * kAttentionBlock, seen[i], state[padded],
                               state[padded + 1]);
      if (by == 1.0f) continue;
      for (int64_t c = 0; c < padded; ++c) state[c] *= by;
    }
    // What all see, then what only the later ones do.
    const int64_t common = seen[0] > 0 ? seen[0] : 0;
    if (common) valueTiles<C, Q, true>(block, 0, common, padded, scores, states);
    for (int i = 1; i < Q; ++i)
      if (seen[i] > common)
        valueTiles<C, 1, false>(block, common, seen[i], padded, scores + i * kAttentionBlock,
                                states + i * floats);
  }
};

}  // namespace
}  // namespace earnest
