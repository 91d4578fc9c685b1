// Matrix products of bf16 weights with activations rounded to bf16 (8-bit activations only; with 15
// bits they stay float32, in matmul.inl's order). vdpbf16ps adds two products to each of 16 float32
// sums, which is what a row of pairs in a bf16 panel is made for (docs/formats/panel.md).
//
// For output row n and token t, with j running over the pairs of columns, all of K:
//   acc = 0
//   for j: acc = fma(w[n][2j], x[t][2j], fma(w[n][2j + 1], x[t][2j + 1], acc))
// rounded to nearest, ties to even, each time; denormals count as zero, whether read or made. So
// does Intel's manual define the instruction, and so was it found to be on Zen 4 (docs/isa.md).
#pragma once

#include "kernels/panel_codecs.inl"

#if EARNEST_BF16_MODEL
#include "emulate/bf16_model.h"
#endif

namespace earnest {

extern const KernelTable kAvx512Vnni;  // for all other codecs, and 15-bit activations

namespace {

#if !EARNEST_BF16_MODEL
EARNEST_INLINE __m512 addPairs(__m512 sums, __m512i w, __m512i x) {
  return _mm512_dpbf16_ps(sums, (__m512bh)w, (__m512bh)x);
}
EARNEST_INLINE __m512i toBf16(__m512 first, __m512 second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}
#endif

// Tokens of the largest tile: with 2 panels 24 sums, and 3 of 32 registers for what they meet. It
// takes 12 independent sums to keep Zen 4 busy half of the time that they wait for each other, and
// one to keep up with its memory.
constexpr int kPairTokens = 12;
constexpr int64_t kGroupBytes = 640 << 10;  // of weights, in a second cache of 1 MiB
constexpr int kRowBytes = 64;  // of 32 columns: of a token, rounded; of 16 rows, 2 columns each

EARNEST_INLINE int64_t rowOf(const Activations& x, int64_t token) {
  if (token >= x.tokens) token = x.tokens - 1;  // a partly filled tile repeats the last token
  return x.select ? x.select[token] : token;
}

// Tokens [begin, begin + T), rounded: [block][T][32]. All that a tile reads lies together: rows a
// power of two apart would displace each other from the first cache.
template <int T>
EARNEST_INLINE void stagePairs(const Activations& x, int64_t begin, uint8_t* staged) {
  for (int t = 0; t < T; ++t) {
    const float* row = x.floats + rowOf(x, begin + t) * x.columns;
    for (int64_t b = 0; b < x.columns / kBlock; ++b)
      Vec::storeB(staged + (b * T + t) * kRowBytes,
                  toBf16(Vec::load(row + 32 * b), Vec::load(row + 32 * b + 16)));
  }
}

// N neighbouring panels x T tokens from `begin` on, all of K.
template <int T, int N>
__attribute__((noinline)) void tilePairs(const Matmul& m, const uint8_t* staged, int64_t panel,
                                         int64_t begin) {
  const int64_t blocks = m.columns / kBlock;
  const uint8_t* w = m.panels + panel * blocks * Bf16::kBytes;
  const int64_t next = blocks * Bf16::kBytes;
  __m512 acc[N][T];
  unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
    unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA { acc[r.value][t.value] = Vec::zero(); });
  });
  for (int64_t b = 0; b < blocks; ++b, w += Bf16::kBytes, staged += T * kRowBytes) {
#pragma GCC unroll 4
    for (int j = 0; j < 16; ++j) {
      __m512i weights[N];
      unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
        weights[r.value] = Vec::loadB(w + r.value * next + kRowBytes * j);
      });
      unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA {
        const __m512i pair = Vec::broadcast(
            reinterpret_cast<const int8_t*>(staged + kRowBytes * t.value + 4 * j));
        unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
          __m512& a = acc[r.value][t.value];
          a = addPairs(a, weights[r.value], pair);
        });
      });
    }
  }
  unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA {
    const int64_t token = begin + t.value < m.x.tokens ? begin + t.value : m.x.tokens - 1;
    unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
      const int64_t at = (panel + r.value) * kPanelRows, left = m.rows - at;
      const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
      _mm512_mask_storeu_ps(m.out + token * m.out_stride + at, mask, acc[r.value][t.value]);
    });
  });
}

template <int T, int N>
void pairsOf(const Matmul& m, int64_t token, int64_t begin, int64_t end, uint8_t* staged) {
  stagePairs<T>(m.x, token, staged);
  int64_t p = begin;
  for (; p + N <= end; p += N) tilePairs<T, N>(m, staged, p, token);
  if constexpr (N > 1)
    if (p < end) tilePairs<T, 1>(m, staged, p, token);
}

// Few tokens wait for memory, and a single stream of weights is what it delivers fastest.
void groupOfPairs(const Matmul& m, int64_t begin, int64_t end, uint8_t* staged) {
  for (int64_t at = 0, left; (left = m.x.tokens - at) > 0; at += kPairTokens) {
    if (left == 1) {
      pairsOf<1, 1>(m, at, begin, end, staged);
    } else if (left <= 4) {
      pairsOf<4, 1>(m, at, begin, end, staged);
    } else if (left <= 8) {
      pairsOf<8, 2>(m, at, begin, end, staged);
    } else {
      pairsOf<kPairTokens, 2>(m, at, begin, end, staged);
    }
  }
}

// All tokens meet so many panels as stay in the second cache, then the next.
void matmulPairs(const Matmul& m, int64_t begin, int64_t end, void* scratch) {
  const int64_t bytes = m.columns / kBlock * Bf16::kBytes, pairs = kGroupBytes / (2 * bytes);
  const int64_t most = m.x.tokens <= kPairTokens ? end - begin : pairs > 0 ? 2 * pairs : 2;
  for (; begin < end; begin += most)
    groupOfPairs(m, begin, begin + most < end ? begin + most : end, static_cast<uint8_t*>(scratch));
}

void matmul(const Matmul& m, int64_t begin, int64_t end, void* scratch) {
  if (m.codec == kBf16 && m.x.planes == kA8) return matmulPairs(m, begin, end, scratch);
  kAvx512Vnni.matmul(m, begin, end, scratch);
}

size_t scratchBytes(int64_t columns, int64_t tokens) {
  const size_t staged = static_cast<size_t>(columns / kBlock * kPairTokens * kRowBytes);
  const size_t others = kAvx512Vnni.scratchBytes(columns, tokens);
  return staged > others ? staged : others;
}

}  // namespace
}  // namespace earnest
