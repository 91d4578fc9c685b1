// Attention of the query heads that share a key/value head, over paged keys and values.
//
// For a query and a segment (kAttentionSegment positions), block by block (kAttentionBlock):
//   s_j = scale * (sum over even channels + sum over odd channels), each in order, with fma
//   m'  = max(m, max_j s_j),  c = e^(m - m'),  p_j = e^(s_j - m')
//   l   = l c + sum_j p_j      (16 lanes over positions, then a tree)
//   o   = o c, then o = fma(p_j, v_j, o) for j in order
// and segments are merged in order: M = max(m, m_s), l = l e^(m - M) + l_s e^(m_s - M), o likewise.
// (Online softmax: Milakov and Gimelshein 2018.) A query only ever reads positions up to its own,
// so what later tokens or stale pages hold cannot matter, not even as a NaN.
#pragma once

#include "kernels/pointwise.inl"

namespace earnest {
namespace {

constexpr int kQueries = Vec::kQueries;
constexpr int64_t kState = 16;  // floats after the values: [0] maximum, [1] sum of weights

int64_t paddedChannels(int64_t channels) { return (channels + 31) / 32 * 32; }
int64_t stateFloats(int64_t channels) { return paddedChannels(channels) + kState; }
size_t attendScratchFloats() { return kQueries * kAttentionBlock; }

struct KvBf16 : Bf16 {
  static constexpr int kNumber = 2;
};
struct KvF32 : F32 {
  static constexpr int kNumber = 4;
};

// Q queries against N panels of 16 positions.
template <class C, int Q, int N>
EARNEST_INLINE void scoreTile(const uint8_t* const (&panels)[N], const float* q, int64_t channels,
                              float scale, float* scores) {
  Vec::F even[Q][N], odd[Q][N];
  unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
    unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
      even[i.value][n.value] = odd[i.value][n.value] = Vec::zero();
    });
  });
  for (int j = 0; j < channels / 2; ++j) {
    Vec::F k0[N], k1[N];
    unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
      C::pair(panels[n.value], j, k0[n.value], k1[n.value]);
    });
    unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
      const Vec::F q0 = Vec::set1(q[i.value * channels + 2 * j]);
      const Vec::F q1 = Vec::set1(q[i.value * channels + 2 * j + 1]);
      unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
        even[i.value][n.value] = Vec::fma(k0[n.value], q0, even[i.value][n.value]);
        odd[i.value][n.value] = Vec::fma(k1[n.value], q1, odd[i.value][n.value]);
      });
    });
  }
  const Vec::F by = Vec::set1(scale);
  unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
    unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
      Vec::store(scores + i.value * kAttentionBlock + 16 * n.value,
                 Vec::mul(Vec::add(even[i.value][n.value], odd[i.value][n.value]), by));
    });
  });
}

// The values of `count` positions of a block into Q states, S runs of 32 channels from run `at`.
// `rows` says where every 16 positions begin; they lie one after the other.
template <class C, int Q, int S>
EARNEST_INLINE void valueTile(const uint8_t* const* rows, int64_t count, int64_t padded,
                              int64_t at, const float* weights, float* const (&states)[Q],
                              const float (&corrections)[Q]) {
  Vec::F even[Q][S], odd[Q][S];
  unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
    const Vec::F by = Vec::set1(corrections[i.value]);
    unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA {
      const float* o = states[i.value] + 32 * (at + s.value);
      even[i.value][s.value] = Vec::mul(Vec::load(o), by);
      odd[i.value][s.value] = Vec::mul(Vec::load(o + 16), by);
    });
  });
  const int64_t row_bytes = padded * C::kNumber;
  for (int64_t from = 0; from < count; from += 16) {
    const uint8_t* row = rows[from / 16];
    const int64_t to = from + 16 < count ? from + 16 : count;
    for (int64_t j = from; j < to; ++j, row += row_bytes) {
      Vec::F v0[S], v1[S];
      unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA {
        C::pair(row, static_cast<int>(at + s.value), v0[s.value], v1[s.value]);
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
      float* o = states[i.value] + 32 * (at + s.value);
      Vec::store(o, even[i.value][s.value]);
      Vec::store(o + 16, odd[i.value][s.value]);
    });
  });
}

// One block for Q heads of one query, which sees `count` of its positions.
template <class C, int Q>
__attribute__((noinline)) void attendBlock(const uint8_t* const* keys, const uint8_t* const* rows,
                                           int64_t count, int64_t channels, float scale,
                                           const float* q, float* state, float* scores) {
  constexpr int kTogether = kQueries < 8 ? 1 : Q <= 2 ? 4 : Q <= 4 ? 2 : 1;  // panels, or runs of channels
  const int64_t padded = paddedChannels(channels), floats = padded + kState;
  const int64_t panels = (count + 15) / 16;
  int64_t p = 0;
  for (; p + kTogether <= panels; p += kTogether) {
    const uint8_t* at[kTogether];
    for (int n = 0; n < kTogether; ++n) at[n] = keys[p + n];
    scoreTile<C, Q, kTogether>(at, q, channels, scale, scores + 16 * p);
  }
  for (; p < panels; ++p) {
    const uint8_t* const at[1] = {keys[p]};
    scoreTile<C, Q, 1>(at, q, channels, scale, scores + 16 * p);
  }
  float* states[Q];
  float corrections[Q];
  for (int i = 0; i < Q; ++i) {
    float* s = scores + i * kAttentionBlock;
    states[i] = state + i * floats;
    float& maximum = states[i][padded];
    float& sum = states[i][padded + 1];
    for (int64_t j = count; j < 16 * panels; ++j) s[j] = -__builtin_inff();
    float lanes[16];
    for (int k = 0; k < 16; ++k) lanes[k] = s[k];
    for (int64_t j = 16; j < 16 * panels; j += 16)
      for (int k = 0; k < 16; ++k) lanes[k] = s[j + k] > lanes[k] ? s[j + k] : lanes[k];
    float top = maximum;
    for (int k = 0; k < 16; ++k) top = lanes[k] > top ? lanes[k] : top;
    for (int64_t j = 0; j < 16 * panels; ++j) s[j] = exponential(s[j] - top);
    for (int k = 0; k < 16; ++k) lanes[k] = s[k];
    for (int64_t j = 16; j < 16 * panels; j += 16)
      for (int k = 0; k < 16; ++k) lanes[k] += s[j + k];
    corrections[i] = exponential(maximum - top);
    sum = sum * corrections[i] + sumOfLanes(lanes);
    maximum = top;
  }
  int64_t run = 0;
  for (; run + kTogether <= padded / 32; run += kTogether)
    valueTile<C, Q, kTogether>(rows, count, padded, run, scores, states, corrections);
  for (; run < padded / 32; ++run)
    valueTile<C, Q, 1>(rows, count, padded, run, scores, states, corrections);
}

template <class C, int Q>
EARNEST_INLINE void attendHeads(int heads, const uint8_t* const* keys, const uint8_t* const* rows,
                                int64_t count, int64_t channels, float scale, const float* q,
                                float* state, float* scores) {
  if constexpr (Q > 0) {
    if (heads == Q)
      attendBlock<C, Q>(keys, rows, count, channels, scale, q, state, scores);
    else
      attendHeads<C, Q - 1>(heads, keys, rows, count, channels, scale, q, state, scores);
  }
}

template <class C>
void attendSegmentAs(const Attention& a, int64_t segment, float* states, float* scores) {
  const int64_t padded = paddedChannels(a.channels), floats = padded + kState;
  const int64_t begin = segment * kAttentionSegment;
  int64_t end = begin + kAttentionSegment;
  if (end > a.first + a.tokens) end = a.first + a.tokens;
  for (int64_t i = 0; i < a.tokens * a.heads; ++i) {
    if (a.first + i / a.heads < begin) continue;
    float* state = states + i * floats;
    for (int64_t c = 0; c < floats; ++c) state[c] = 0.0f;
    state[padded] = -__builtin_inff();
  }
  // Heads in tiles of nearly the same size: 5 of at most 3 become 3 and 2.
  const int tiles = (a.heads + kQueries - 1) / kQueries;
  for (int64_t at = begin; at < end; at += kAttentionBlock) {
    const uint8_t* keys[kAttentionBlock / 16];
    const uint8_t* rows[kAttentionBlock / 16];
    for (int64_t g = 0; g < kAttentionBlock / 16 && at + 16 * g < end; ++g) {
      const int64_t position = at + 16 * g, slot = position % a.kv.page;
      const uint8_t* page = a.kv.base + a.kv.table[position / a.kv.page] * a.kv.page_stride;
      keys[g] = page + slot * a.channels * C::kNumber;
      rows[g] = page + a.kv.values_at + slot * padded * C::kNumber;
    }
    for (int64_t t = 0; t < a.tokens; ++t) {
      const int64_t seen = a.first + t + 1 - at;
      if (seen <= 0) continue;
      const int64_t count = seen < kAttentionBlock ? seen : kAttentionBlock;
      for (int tile = 0; tile < tiles; ++tile) {
        const int from = a.heads * tile / tiles, to = a.heads * (tile + 1) / tiles;
        attendHeads<C, kQueries>(to - from, keys, rows, count, a.channels, a.scale,
                                 a.q + t * a.q_stride + from * a.channels,
                                 states + (t * a.heads + from) * floats, scores);
      }
    }
  }
}

void attendSegment(const Attention& a, int64_t segment, float* states, float* scratch) {
  if (a.type == kKvF32)
    attendSegmentAs<KvF32>(a, segment, states, scratch);
  else
    attendSegmentAs<KvBf16>(a, segment, states, scratch);
}

void mergeState(float* into, const float* from, int64_t channels) {
  const int64_t padded = paddedChannels(channels);
  const float m = into[padded], n = from[padded];
  const float top = n > m ? n : m;
  const float old = exponential(m - top), fresh = exponential(n - top);
  for (int64_t c = 0; c < padded; ++c) into[c] = into[c] * old + from[c] * fresh;
  into[padded + 1] = into[padded + 1] * old + from[padded + 1] * fresh;
  into[padded] = top;
}

void finishState(const float* state, int64_t channels, float* out) {
  const float inverse = 1.0f / state[paddedChannels(channels) + 1];
  for (int64_t c = 0; c < channels; ++c) out[c] = state[c] * inverse;
}

const StepKernels stepKernels = {rmsNorm,     swiglu,       add,           addScaled,
                                 stateFloats, attendSegment, attendScratchFloats, mergeState,
                                 finishState};

}  // namespace
}  // namespace earnest
