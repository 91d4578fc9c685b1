// What a worker of a step has to itself, and how workers divide what they do.
#pragma once

#include <algorithm>

#include "model/step.h"

namespace earnest {

// Batches of at most so many tokens are too small to divide their row work: a barrier costs more.
inline constexpr int64_t kAloneTokens = 2;
// Queries of a chunk that one worker attends for: each block of keys and values is then read from
// the cache and not from memory.
inline constexpr int64_t kChunk = 16;
// Sequences with at most so many new tokens have their past divided among workers.
inline constexpr int64_t kSplitTokens = 4;
// Results of a matrix product that a worker holds at a time.
inline constexpr int64_t kBandFloats = 65536;
inline constexpr int64_t kCheckMilliseconds = 50;
inline constexpr int64_t kCounterStride = 8;  // a cache line each
inline constexpr int64_t kLayerPhases = 7;     // the most that a layer shares out
// Places in `done_`.
inline constexpr int64_t kDoneNorm = 0, kDoneRouter = 1, kDoneShared = 2, kDoneExperts = 3;

inline constexpr uint32_t kIntegerForm = 1, kFloatForm = 2, kBf16Form = 4;

inline uint32_t formOf(const Matrix& m) {
  if (!m) return 0;
  return m.codec == kBf16 ? kBf16Form : m.codec < kBf16 ? kFloatForm : kIntegerForm;
}

// Which tokens go to which expert: counting sort by expert, tokens in order.
struct Grouping {
  int32_t* chosen = nullptr;   // [tokens][active]
  float* weights = nullptr;    // [tokens][active]
  int32_t* starts = nullptr;   // [experts + 1]: expert e has entries [starts[e], starts[e + 1])
  int32_t* tokens = nullptr;   // [entries]
  float* factors = nullptr;    // [entries]
  int32_t* used = nullptr;     // experts that have any, ascending
  int64_t used_count = 0;

  void take(Arena& arena, int64_t rows, int64_t experts, int64_t active) {
    chosen = arena.take<int32_t>(rows * active);
    weights = arena.take<float>(rows * active);
    starts = arena.take<int32_t>(experts + 1);
    tokens = arena.take<int32_t>(rows * active);
    factors = arena.take<float>(rows * active);
    used = arena.take<int32_t>(experts);
  }
};

// Panels divided into a large piece for each worker and small ones for who is done with that first.
struct Bands {
  int64_t panels, larges, large, small;

  int64_t begin(int64_t i) const {
    return std::min(panels, std::min(i, larges) * large + std::max<int64_t>(i - larges, 0) * small);
  }
  int64_t count() const { return larges + (panels - begin(larges) + small - 1) / small; }
};

struct Step::Worker {
  int ith = 0, nth = 1;
  int64_t phase = 0;
  int64_t moe_index = 0;
  int64_t done = 0;  // how many of `done_` the last layer counted in
  float *row = nullptr, *first = nullptr, *second = nullptr, *logits = nullptr;
  float *states = nullptr, *more_states = nullptr;
  uint8_t *matmul = nullptr, *attention = nullptr;
  Operand hidden, heads;  // of the few tokens that every worker prepares for itself
  Grouping grouping;
};

template <class Body>
void Step::share(Worker& w, int64_t items, Body body) {
  std::atomic<int64_t>& next = counters_[w.phase++ * kCounterStride];
  if (w.nth == 1) {
    for (int64_t i = 0; i < items; ++i) body(i);
    return;
  }
  for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(i);
}

// Work on whole rows: all of them by every worker for itself, or each by one.
template <class Body>
void Step::rows(Worker& w, int64_t count, Body body) {
  if (alone_) {
    for (int64_t t = 0; t < count; ++t) body(t);
    return;
  }
  for (int64_t t = w.ith; t < count; t += w.nth) body(t);
  pool_.barrier();
}

}  // namespace earnest
