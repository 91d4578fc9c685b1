// Matrix products from panels, over the vector traits. Decode and prefill share one body and one
// order of float32 operations, so a row's result does not depend on how many rows came with it.
//
// Integer codecs, for output row n and token t, with b running over the blocks of 32 columns and p
// over the parts of a block that have a scale of their own (one, or two of 16 columns):
//   acc = 0
//   for b: for p: acc = fma(float(sum_k (q - offset) v), scale_w[n,b,p] * scale_x[t,b], acc)
//          if minima: acc = fma(minimum[n,b], scale_x[t,b] * float(sum_k v), acc)
// The integer sum is exact in int32: q - offset has at most 9 bits with its sign, v 15, and 32
// products are summed: 2^8 * 2^14 * 2^5 = 2^27.
//
// Plain codecs: in a block of 32 columns even and odd columns are summed apart, in order, with fma
// (the order of tdpbf16ps); then acc = acc + (even + odd).
#pragma once

#include "kernels/panel_codecs.inl"

namespace earnest {
namespace {

// Where the values of T tokens lie. Tokens beyond those wanted repeat the last: the same result is
// written to the same place again, which spares a kernel for every count.
template <int T>
struct Rows {
  const int8_t* values[T];
  const ActivationBlock* blocks[T];
  float* out[T];
};

// The 16 results of a panel, of which `count` are rows of the matrix.
EARNEST_INLINE void storeRows(float* out, Vec::F x, int64_t count) {
  if (count >= kPanelRows) {
    Vec::store(out, x);
  } else {
    float all[16];
    Vec::store(all, x);
    for (int64_t i = 0; i < count; ++i) out[i] = all[i];
  }
}

// Fetches what N streams of weights will deliver some distance further on, into the second cache:
// the processor's own prefetchers stop at the ends of pages and do not keep several streams that far
// ahead. A single stream they follow by themselves; fetching for them made it slower by a quarter
// (docs/log.md).
template <class C, int N>
EARNEST_INLINE void fetchAhead(const uint8_t* const (&w)[N], int run) {
  if constexpr (N > 1 && !C::kCached) {
    constexpr int kStep = C::kBytes / C::kRuns;  // bytes of 32 columns
    // Codecs of few bits compute longer on what they read and want to look further; for the others
    // that is too far (docs/log.md has the table).
    constexpr int kDistance = kStep < 512 ? 4096 : 1024;
    unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
      for (int i = 0; i < kStep; i += 64)
        __builtin_prefetch(w[r.value] + run * kStep + kDistance + i, 0, 2);
    });
  }
}

template <int N>
struct Columns {
  int64_t at[N];     // first output row of each panel
  int64_t count[N];  // rows of the matrix in it
};

// Whether odd groups stay where they are in their bytes: a lone token pays for each operation that
// unpacks its weights.
template <class C, int kTiles>
constexpr bool raisesOdd() {
  return kTiles == 1 && requires(Vec::B b) { C::template raisedPair<0>(nullptr, b, b); };
}

// Of a sum whose odd groups may count sixteen times: exact, for 16 divides their part.
template <bool kRaised, class S, class V = Vec>
EARNEST_INLINE Vec::I totalOf(const S& sum) {
  if constexpr (kRaised)
    return V::addI(sum.v[0], V::lower4(sum.v[1]));
  else
    return sum.total();
}

// N panels x T tokens, all of K. P planes of activations. With `kRefresh` activations are touched
// once more, half a panel after their use. Never inlined: a compiler that put all tiles into one
// function would take minutes over it.
template <class C, int T, int P, int N, bool kRefresh = false>
__attribute__((noinline)) void tile(const uint8_t* const (&panels)[N], int64_t blocks, const Rows<T>& x,
          const Columns<N>& columns) {
  Vec::F acc[N][T];
  unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
    unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA { acc[r.value][t.value] = Vec::zero(); });
  });
  const uint8_t* w[N];
  for (int r = 0; r < N; ++r) w[r] = panels[r];
  for (int64_t b = 0; b < blocks; b += C::kRuns) {
    typename C::Head head[N];
    unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA { head[r.value].load(w[r.value]); });
    for (int run = 0; run < C::kRuns; ++run) {
      const int64_t at = b + run;
      fetchAhead<C>(w, run);
      if constexpr (kRefresh) {
        const int64_t other = at < blocks / 2 ? at + blocks / 2 : at - blocks / 2;
        __builtin_prefetch(x.values[0] + other * (32 * P));
        if (other % 4 == 0) __builtin_prefetch(x.blocks[0] + other);
      }
      unroll<0, C::kParts>([&](auto part) EARNEST_INLINE_LAMBDA {
        constexpr int kPairs = 4 / C::kParts;
        // Even and odd groups apart, where there are too few sums to wait for. With a scale per 16
        // columns there are enough.
        constexpr int kChains = N * T * P <= 2 && C::kParts == 1 ? 2 : 1;
        constexpr bool kRaised = raisesOdd<C, N * T>();
        typename Vec::template Sum<C::kMax, C::kSigned, kChains> sum[N][T][P];
        const auto offsetOf = [&](const ActivationBlock& block) EARNEST_INLINE_LAMBDA {
          int32_t of = block.sum;
          if constexpr (C::kParts == 2) of = part.value ? of - block.sum_first : block.sum_first;
          return -C::kOffset * of;
        };
        // Sums that begin with the offset spare adding it; where little else is computed (q8_0),
        // waiting for it costs more.
        constexpr bool kBegun = N * T == 1 && C::kOffset != 0 && C::kMax < 128 &&
                                requires { sum[0][0][0].begin(0); };
        if constexpr (kBegun) sum[0][0][P - 1].begin(offsetOf(x.blocks[0][at]));
        unroll<0, kPairs>([&](auto i) EARNEST_INLINE_LAMBDA {
          constexpr int j = part.value * kPairs + i.value;
          Vec::B even[N], odd[N];
          unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
            const uint8_t* from = C::weights(w[r.value], run);
            if constexpr (kRaised)
              C::template raisedPair<j>(from, even[r.value], odd[r.value]);
            else
              C::template pair<j>(from, even[r.value], odd[r.value]);
          });
          unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA {
            unroll<0, P>([&](auto p) EARNEST_INLINE_LAMBDA {
              const int8_t* v = x.values[t.value] + at * (32 * P) + 32 * p.value + 8 * j;
              if constexpr (N == 1 && requires { sum[0][0][0].template addAt<0>(even[0], v); }) {
                auto& s = sum[0][t.value][p.value];
                s.template addAt<2 * i.value>(even[0], v);
                s.template addAt<2 * i.value + 1>(odd[0], v + 4);
              } else {
                const Vec::A first = Vec::broadcast(v), second = Vec::broadcast(v + 4);
                unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
                  auto& s = sum[r.value][t.value][p.value];
                  s.template add<2 * i.value>(even[r.value], first);
                  s.template add<2 * i.value + 1>(odd[r.value], second);
                });
              }
            });
          });
        });
        Vec::F scale[N];
        unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
          scale[r.value] = head[r.value].scale(run, part.value);
        });
        unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA {
          const ActivationBlock& block = x.blocks[t.value][at];
          const Vec::F scale_x = Vec::set1(block.scale);
          Vec::I offset;
          if constexpr (C::kOffset != 0 && !kBegun) offset = Vec::set1I(offsetOf(block));
          unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
            auto& s = sum[r.value][t.value];
            Vec::I total = totalOf<kRaised>(s[0]);
            if constexpr (P == 2) total = Vec::addI(Vec::shift7(total), totalOf<kRaised>(s[P - 1]));
            if constexpr (C::kOffset != 0 && !kBegun) total = Vec::addI(total, offset);
            Vec::F& a = acc[r.value][t.value];
            a = Vec::fma(Vec::toFloat(total), Vec::mul(scale[r.value], scale_x), a);
          });
        });
      });
      if constexpr (C::kMin) {
        unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
          const Vec::F minimum = head[r.value].minimum(run);
          unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA {
            const Vec::F sum = Vec::set1(x.blocks[t.value][at].scaled_sum);
            Vec::F& a = acc[r.value][t.value];
            a = Vec::fma(minimum, sum, a);
          });
        });
      }
    }
    for (int r = 0; r < N; ++r) w[r] += C::kBytes;
  }
  unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
    unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA {
      storeRows(x.out[t.value] + columns.at[r.value], acc[r.value][t.value],
                columns.count[r.value]);
    });
  });
}

// Rows [begin, begin + T) of the tokens, the last one repeated.
template <int T>
Rows<T> rowsFrom(const Matmul& m, int64_t begin) {
  Rows<T> rows;
  const int64_t blocks = m.columns / kBlock, bytes = blocks * kBlock * m.x.planes;
  for (int t = 0; t < T; ++t) {
    const int64_t token = begin + t < m.x.tokens ? begin + t : m.x.tokens - 1;
    const int64_t row = m.x.select ? m.x.select[token] : token;
    rows.values[t] = m.x.values + row * bytes;
    rows.blocks[t] = m.x.blocks + row * blocks;
    rows.out[t] = m.out + token * m.out_stride;
  }
  return rows;
}

// The p-th of each N-th part of the panels [begin, end), the last one repeated. Parts that lie far
// apart are streams of their own to the processor's prefetchers; neighbours confuse them.
template <int N>
Columns<N> columnsFrom(const Matmul& m, int64_t begin, int64_t end, int64_t p, int64_t (&panels)[N]) {
  Columns<N> columns;
  const int64_t part = (end - begin + N - 1) / N;
  for (int r = 0; r < N; ++r) {
    panels[r] = begin + r * part + p < end ? begin + r * part + p : end - 1;
    columns.at[r] = panels[r] * kPanelRows;
    const int64_t left = m.rows - columns.at[r];
    columns.count[r] = left < kPanelRows ? left : kPanelRows;
  }
  return columns;
}

// Tokens [begin, begin + size) with the smallest tile that holds them: 2, 3, 4 or the largest
// (measured on Zen 4: a tile for 5 gains 8% at five tokens only).
template <class C, int P, int T, int N>
EARNEST_INLINE void tileOf(int64_t size, const Matmul& m, const uint8_t* const (&w)[N],
                           const Columns<N>& columns, int64_t begin) {
  constexpr int kMost = Vec::kTokens[P - 1];
  if constexpr (T < kMost) {
    constexpr int kNext = T < 4 ? T + 1 : kMost;
    if (size > T) return tileOf<C, P, kNext, N>(size, m, w, columns, begin);
  }
  tile<C, T, P, N>(w, m.columns / kBlock, rowsFrom<T>(m, begin), columns);
}

// Tiles as equal as can be: 8 tokens are 4 + 4, not 6 + 2; 10 are 6 + 4, for want of a tile for 5.
// Expanded panels meet many tokens and the last tile matters little: one size is enough for them.
template <class C, int P, int N>
EARNEST_INLINE void tilesOfAllTokens(const Matmul& m, const uint8_t* const (&w)[N],
                                     const Columns<N>& columns) {
  constexpr int T = Vec::kTokens[P - 1], kLeast = C::kCached ? T : T < 2 ? T : 2;
  int64_t at = 0;
  for (int64_t tiles = (m.x.tokens + T - 1) / T; tiles > 0; --tiles) {
    int64_t size = (m.x.tokens - at + tiles - 1) / tiles;
    if (C::kCached || size > 4) size = T;
    tileOf<C, P, kLeast, N>(size, m, w, columns, at);
    at += size;
  }
}

// One token: one stream of panels. Every panel reads the activations again; where both together are
// more than a first cache of 32 KiB, panels push them out of it. Touched twice a panel they stay, as
// long as half a panel leaves them room (docs/log.md).
template <class C, int P>
void matmulOne(const Matmul& m, int64_t begin, int64_t end) {
  const int64_t blocks = m.columns / kBlock, bytes = blocks / C::kRuns * C::kBytes;
  const int64_t own = blocks * static_cast<int64_t>(kBlock * P + sizeof(ActivationBlock));
  const bool refresh = own + bytes > 29000 && own + bytes / 2 < 26000;
  for (int64_t p = begin; p < end; ++p) {
    int64_t panel[1];
    const Columns<1> columns = columnsFrom<1>(m, p, p + 1, 0, panel);
    const uint8_t* const w[1] = {m.panels + p * bytes};
    if (refresh)
      tile<C, 1, P, 1, true>(w, blocks, rowsFrom<1>(m, 0), columns);
    else
      tile<C, 1, P, 1>(w, blocks, rowsFrom<1>(m, 0), columns);
  }
}

template <class C, int P, int N>
__attribute__((noinline)) void matmulIntegers(const Matmul& m, int64_t begin, int64_t end, void* scratch) {
  const int64_t blocks = m.columns / kBlock, tokens = m.x.tokens;
  const int64_t bytes = blocks / C::kRuns * C::kBytes;
  for (int64_t p = 0; p < (end - begin + N - 1) / N; ++p) {
    int64_t panel[N];
    const Columns<N> columns = columnsFrom<N>(m, begin, end, p, panel);
    const uint8_t* w[N];
    for (int r = 0; r < N; ++r) w[r] = m.panels + panel[r] * bytes;
    if (tokens <= Vec::kUnexpanded) {
      tilesOfAllTokens<C, P, N>(m, w, columns);
    } else {
      using E = Expanded<C>;
      uint8_t* expanded = static_cast<uint8_t*>(scratch);
      const uint8_t* unpacked[N];
      for (int r = 0; r < N; ++r, expanded += blocks * E::kBytes) {
        expand<C>(w[r], blocks, expanded);
        unpacked[r] = expanded;
      }
      tilesOfAllTokens<E, P, N>(m, unpacked, columns);
    }
  }
}

template <class C, int T, int N>
__attribute__((noinline)) void tileFloats(const uint8_t* const (&panels)[N], int64_t blocks, const float* const (&x)[T],
                float* const (&out)[T], const Columns<N>& columns) {
  Vec::F acc[N][T];
  unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
    unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA { acc[r.value][t.value] = Vec::zero(); });
  });
  const uint8_t* w[N];
  for (int r = 0; r < N; ++r) w[r] = panels[r];
  for (int64_t b = 0; b < blocks; ++b) {
    fetchAhead<C>(w, 0);
    Vec::F even[N][T], odd[N][T];
    unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
      unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA {
        even[r.value][t.value] = odd[r.value][t.value] = Vec::zero();
      });
    });
#pragma GCC unroll 4
    for (int j = 0; j < 16; ++j) {
      Vec::F w0[N], w1[N];
      unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
        C::pair(w[r.value], j, w0[r.value], w1[r.value]);
      });
      unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA {
        const Vec::F x0 = Vec::set1(x[t.value][32 * b + 2 * j]);
        const Vec::F x1 = Vec::set1(x[t.value][32 * b + 2 * j + 1]);
        unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
          even[r.value][t.value] = Vec::fma(w0[r.value], x0, even[r.value][t.value]);
          odd[r.value][t.value] = Vec::fma(w1[r.value], x1, odd[r.value][t.value]);
        });
      });
    }
    unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
      unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA {
        Vec::F& a = acc[r.value][t.value];
        a = Vec::add(a, Vec::add(even[r.value][t.value], odd[r.value][t.value]));
      });
    });
    for (int r = 0; r < N; ++r) w[r] += C::kBytes;
  }
  unroll<0, N>([&](auto r) EARNEST_INLINE_LAMBDA {
    unroll<0, T>([&](auto t) EARNEST_INLINE_LAMBDA {
      storeRows(out[t.value] + columns.at[r.value], acc[r.value][t.value], columns.count[r.value]);
    });
  });
}

template <class C, int T, int N>
EARNEST_INLINE void floatTiles(const Matmul& m, const uint8_t* const (&w)[N],
                               const Columns<N>& columns) {
  for (int64_t begin = 0; begin < m.x.tokens; begin += T) {
    const float* x[T];
    float* out[T];
    for (int t = 0; t < T; ++t) {
      const int64_t token = begin + t < m.x.tokens ? begin + t : m.x.tokens - 1;
      x[t] = m.x.floats + (m.x.select ? m.x.select[token] : token) * m.columns;
      out[t] = m.out + token * m.out_stride;
    }
    tileFloats<C, T, N>(w, m.columns / kBlock, x, out, columns);
  }
}

template <class C, int T, int N>
void matmulFloats(const Matmul& m, int64_t begin, int64_t end) {
  const int64_t bytes = m.columns / kBlock * C::kBytes;
  for (int64_t p = 0; p < (end - begin + N - 1) / N; ++p) {
    int64_t panel[N];
    const Columns<N> columns = columnsFrom<N>(m, begin, end, p, panel);
    const uint8_t* w[N];
    for (int r = 0; r < N; ++r) w[r] = m.panels + panel[r] * bytes;
    floatTiles<C, T, N>(m, w, columns);
  }
}

template <class C, int P>
EARNEST_INLINE void matmulPanels(const Matmul& m, int64_t begin, int64_t end, void* scratch) {
  if (m.x.tokens == 1) {
    matmulOne<C, P>(m, begin, end);
  } else {
    matmulIntegers<C, P, R>(m, begin, end, scratch);
  }
}

template <class C>
EARNEST_INLINE void matmulPlanes(const Matmul& m, int64_t begin, int64_t end, void* scratch) {
  if (m.x.planes == kA15) {
    matmulPanels<C, 2>(m, begin, end, scratch);
  } else {
    matmulPanels<C, 1>(m, begin, end, scratch);
  }
}

template <class C>
EARNEST_INLINE void matmulPlain(const Matmul& m, int64_t begin, int64_t end) {
  if (m.x.tokens == 1) {
    matmulFloats<C, 1, 1>(m, begin, end);
  } else {
    matmulFloats<C, Vec::kFloatTokens, R>(m, begin, end);
  }
}

void matmul(const Matmul& m, int64_t begin, int64_t end, void* scratch) {
  if (m.x.tokens <= 0 || begin >= end) return;
  switch (m.codec) {
    case kF32: return matmulPlain<F32>(m, begin, end);
    case kF16: return matmulPlain<F16>(m, begin, end);
    case kBf16: return matmulPlain<Bf16>(m, begin, end);
    case kQ8_0: return matmulPlanes<Q8_0>(m, begin, end, scratch);
    case kQ4_0: return matmulPlanes<Q4_0>(m, begin, end, scratch);
    case kQ4_1: return matmulPlanes<Q4_1>(m, begin, end, scratch);
    case kQ5_0: return matmulPlanes<Q5_0>(m, begin, end, scratch);
    case kQ5_1: return matmulPlanes<Q5_1>(m, begin, end, scratch);
    case kQ4_K: return matmulPlanes<Q4_K>(m, begin, end, scratch);
    case kQ5_K: return matmulPlanes<Q5_K>(m, begin, end, scratch);
    case kQ6_K: return matmulPlanes<Q6_K>(m, begin, end, scratch);
    default: return;
  }
}

// Room for R expanded panels.
size_t scratchBytes(int64_t columns, int64_t) {
  return static_cast<size_t>(R * (columns / kBlock) * kExpandedBytesMax);
}

}  // namespace
}  // namespace earnest
