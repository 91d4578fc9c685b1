// Scores and sums of values over 8-bit keys and values, each position and head with a scale.
//
// A query becomes integers v of 15 bits with one scale (as activations do: activations.inl, but 16256
// is the whole query's), and so do the weights of a block, after the values' scales have been
// multiplied in:
//   s_j = float(sum over channels of k v) * (scale_k[j] * scale_q)
//   w_j = p_j * scale_v[j] ~ scale_w * u_j
//   o   = fma(float(sum over positions of v_j u_j), scale_w, o c)
// The integer sums are exact: |k v| < 2^7 2^14, of at most kScaledChannelsMax channels. Positions that
// a query does not see have u = 0.
#pragma once

#include "kernels/pointwise.inl"

namespace earnest {
namespace {

constexpr float kFine = 16256.0f;  // 127 * 128: two planes of 8 bits, v = 128 hi + lo

// `count` numbers to [count / 4][stride of 8 bytes][plane][4]; zeros up to a multiple of 4. Returns
// the scale: NaN if one of them is not finite.
EARNEST_INLINE float toPlanes(const float* x, int64_t count, int64_t stride, int8_t* planes,
                              int32_t& sum) {
  int32_t largest = 0;
  for (int64_t j = 0; j < count; ++j) {
    int32_t bits;
    __builtin_memcpy(&bits, x + j, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float amax;
  __builtin_memcpy(&amax, &largest, 4);
  const bool good = largest < 0x7f800000 && amax >= 0x1p-100f;
  const float inverse = good ? kFine / amax : 0.0f;
  constexpr int64_t kSome = 128;  // a multiple of 4
  sum = 0;
  for (int64_t at = 0; at < count; at += kSome) {
    const int64_t some = count - at < kSome ? count - at : kSome;
    alignas(64) int8_t high[kSome] = {}, low[kSome] = {};
    for (int64_t j = 0; j < some; ++j) {
      // Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the lowest bits.
      const float rounded = (good ? x[at + j] * inverse : 0.0f) + 12582912.0f;
      int32_t v;
      __builtin_memcpy(&v, &rounded, 4);
      v -= 0x4b400000;
      sum += v;
      const int32_t upper = (v + 64) >> 7;
      high[j] = static_cast<int8_t>(upper);
      low[j] = static_cast<int8_t>(v - upper * 128);
    }
    for (int64_t j = 0; j < some; j += 4, planes += 8 * stride) {
      __builtin_memcpy(planes, high + j, 4);
      __builtin_memcpy(planes + 4, low + j, 4);
    }
  }
  return good ? amax / kFine : largest >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
}

struct ByteKv {
  static constexpr int kHalf = Vec::kAccumulators / 2 > 0 ? Vec::kAccumulators / 2 : 1;
  static constexpr int kQueries = Vec::kQueries < kHalf ? Vec::kQueries : kHalf;
  // Scores, then integer weights.
  static constexpr int64_t kWorkBytes = (4 + 2) * kQueries * kAttentionBlock;
  using Sum = Vec::Sum<SignedBytes::kMax, SignedBytes::kSigned, 1>;

  static int64_t groups(int64_t channels) { return (channels + 3) / 4; }
  static int64_t keyBytes(int64_t channels) { return kScaleBytes + 64 * groups(channels); }
  static int64_t valueBytes(int64_t channels) {
    return kScaleBytes + 16 * paddedChannels(channels);
  }
  // Scales and sums of the queries, then their integers.
  static int64_t packedBytes(int64_t channels) {
    return 8 * kQueries * (1 + groups(channels));
  }

  static void pack(const float* const* q, int queries, int64_t channels, float scale,
                   uint8_t* packed) {
    for (int i = 0; i < queries; ++i) {
      int32_t sum;
      const float own = scale * toPlanes(q[i], channels, queries,
                                         reinterpret_cast<int8_t*>(packed) + 8 * (kQueries + i),
                                         sum);
      __builtin_memcpy(packed + 8 * i, &own, 4);
      __builtin_memcpy(packed + 8 * i + 4, &sum, 4);
    }
  }

  static EARNEST_INLINE Vec::B load(const uint8_t* p) {
    const Vec::B b = Vec::loadB(p);
    return SignedBytes::kSigned ? b : Vec::flipSign(b);
  }
  static EARNEST_INLINE Vec::F total(const Sum (&sum)[2], int32_t of) {
    Vec::I all = Vec::addI(Vec::shift7(sum[0].total()), sum[1].total());
    if constexpr (Vec::kSignedOffset != 0) all = Vec::addI(all, Vec::set1I(-Vec::kSignedOffset * of));
    return Vec::toFloat(all);
  }

  // As in attention_floats.inl, four channels at a time.
  template <int Q, int N>
  static EARNEST_INLINE void scoreTile(const uint8_t* const* panels, const uint8_t* const* fetch,
                                       const uint8_t* packed, int64_t channels, float* scores) {
    Sum sum[Q][N][2];
    const uint8_t *at[N], *ahead[N];
    for (int n = 0; n < N; ++n) at[n] = panels[n] + kScaleBytes, ahead[n] = fetch[n] + kScaleBytes;
    for (int n = 0; n < N; ++n) __builtin_prefetch(fetch[n], 0, 2);
    const int8_t* v = reinterpret_cast<const int8_t*>(packed) + 8 * kQueries;
    const int64_t bytes = 64 * groups(channels);
    for (int64_t byte = 0; byte < bytes; byte += 64, v += 8 * Q) {
      Vec::B k[N];
      unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
        k[n.value] = load(at[n.value] + byte);
        __builtin_prefetch(ahead[n.value] + byte, 0, 2);
      });
      unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
        unroll<0, 2>([&](auto p) EARNEST_INLINE_LAMBDA {
          const Vec::A a = Vec::broadcast(v + 8 * i.value + 4 * p.value);
          unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
            auto& s = sum[i.value][n.value][p.value];
            s.template add<0>(k[n.value], a);
            // In its register: gcc 12 moved 64 of them about in every turn of this loop.
            if constexpr (requires { s.keep(); }) s.keep();
          });
        });
      });
    }
    unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
      float scale;
      int32_t of;
      __builtin_memcpy(&scale, packed + 8 * i.value, 4);
      __builtin_memcpy(&of, packed + 8 * i.value + 4, 4);
      unroll<0, N>([&](auto n) EARNEST_INLINE_LAMBDA {
        const Vec::F by = Vec::load(reinterpret_cast<const float*>(panels[n.value]));
        Vec::store(scores + i.value * kAttentionBlock + 16 * n.value,
                   Vec::mul(total(sum[i.value][n.value], of), Vec::mul(by, Vec::set1(scale))));
      });
    });
  }

  // S vectors of 16 channels from vector `run`; `groups` runs of 4 positions.
  template <int Q, int S>
  static EARNEST_INLINE void valueTile(const Block& block, int64_t groups, int64_t padded,
                                       int64_t run, const int8_t* weights, const int32_t* sums,
                                       const float* scales, const float* corrections,
                                       const int64_t* seen, float* states) {
    Sum sum[Q][S][2];
    const int64_t row = 4 * padded;  // bytes of 4 positions
    const uint8_t* ahead = nullptr;
    for (int64_t g = 0; g < groups; ++g, weights += 8 * Q) {
      const uint8_t* at = block.values[g / 4] + kScaleBytes + g % 4 * row + 64 * run;
      if (g % 4 == 0)
        ahead = kScaleBytes + keysAfter(block, 64 * (run * groups + g * S), 16 * padded);
      if (run == 0 && g % 4 == 0) __builtin_prefetch(block.fetch_keys[g / 4], 0, 2);
      Vec::B v[S];
      unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA {
        v[s.value] = load(at + 64 * s.value);
        __builtin_prefetch(ahead + 64 * s.value, 0, 2);
      });
      ahead += 64 * S;
      unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
        unroll<0, 2>([&](auto p) EARNEST_INLINE_LAMBDA {
          const Vec::A a = Vec::broadcast(weights + 8 * i.value + 4 * p.value);
          unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA {
            sum[i.value][s.value][p.value].template add<0>(v[s.value], a);
          });
        });
      });
    }
    unroll<0, Q>([&](auto i) EARNEST_INLINE_LAMBDA {
      if (seen[i.value] <= 0) return;
      const Vec::F scale = Vec::set1(scales[i.value]), by = Vec::set1(corrections[i.value]);
      unroll<0, S>([&](auto s) EARNEST_INLINE_LAMBDA {
        float* o = states + i.value * (padded + kState) + 16 * (run + s.value);
        Vec::store(o, Vec::fma(total(sum[i.value][s.value], sums[i.value]), scale,
                               Vec::mul(Vec::load(o), by)));
      });
    });
  }

  template <int Q>
  __attribute__((noinline)) static void attend(const Block& block, const int64_t* seen,
                                               int64_t channels, const uint8_t* packed,
                                               float* states, uint8_t* work) {
    float* scores = reinterpret_cast<float*>(work);
    int8_t* weights = reinterpret_cast<int8_t*>(work + 4 * Q * kAttentionBlock);
    const int64_t padded = paddedChannels(channels), floats = padded + kState;
    const int64_t panels = (seen[Q - 1] + 15) / 16;
    constexpr int N = beside(2 * Q);
    int64_t p = 0;
    for (; p + N <= panels; p += N)
      scoreTile<Q, N>(block.keys + p, block.fetch_values + p, packed, channels, scores + 16 * p);
    if constexpr (N > 1)
      for (; p < panels; ++p)
        scoreTile<Q, 1>(block.keys + p, block.fetch_values + p, packed, channels, scores + 16 * p);
    float corrections[Q], scales[Q];
    int32_t sums[Q];
    for (int i = 0; i < Q; ++i) {
      float* s = scores + i * kAttentionBlock;
      float* state = states + i * floats;
      const int64_t sees = seen[i] > 0 ? seen[i] : 0;
      corrections[i] = 1.0f;
      if (sees) corrections[i] = softmax(s, sees, state[padded], state[padded + 1]);
      scaleWeights(s, panels, block);
      for (int64_t j = sees; j < 16 * panels; ++j) s[j] = 0.0f;
      scales[i] = toPlanes(s, 16 * panels, Q, weights + 8 * i, sums[i]);
    }
    constexpr int S = beside(2 * Q) < 4 ? beside(2 * Q) : 4;
    int64_t run = 0;
    for (; run + S <= padded / 16; run += S)
      valueTile<Q, S>(block, 4 * panels, padded, run, weights, sums, scales, corrections, seen,
                      states);
    if constexpr (S > 1)
      for (; run < padded / 16; ++run)
        valueTile<Q, 1>(block, 4 * panels, padded, run, weights, sums, scales, corrections, seen,
                        states);
  }
};

}  // namespace
}  // namespace earnest
