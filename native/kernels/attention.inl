// Attention of the query heads that share a key/value head, over paged keys and values.
//
// For a query and a segment (kAttentionSegment positions), block by block (kAttentionBlock):
//   s_j = sum over channels of key and scaled query
//   m'  = max(m, max_j s_j),  c = e^(m - m'),  p_j = e^(s_j - m')
//   l   = l c + sum_j p_j      (16 lanes over positions, then a tree)
//   o   = o c + sum_j p_j v_j
// and segments are merged in order: M = max(m, m_s), l = l e^(m - M) + l_s e^(m_s - M), o likewise.
// (Online softmax: Milakov and Gimelshein 2018.) How the two products are summed depends on the
// type of keys and values: attention_floats.inl, attention_shorts.inl, attention_bytes.inl.
//
// Queries, whether heads of a token or tokens of a chunk, are worked on in tiles that share what is
// read, but no float operation of a query depends on the others of its tile. A query only ever reads
// positions up to its own, so what later tokens or stale pages hold cannot matter, not even as a
// NaN.
#pragma once

#include "kernels/pointwise.inl"

namespace earnest {
namespace {

constexpr int64_t kScaleBytes = 64;  // of 16 positions that have them
constexpr int64_t kState = 16;  // floats after the values: [0] maximum, [1] sum of weights

int64_t paddedChannels(int64_t channels) { return (channels + 31) / 32 * 32; }
int64_t stateFloats(int64_t channels) { return paddedChannels(channels) + kState; }

// How many vectors of 16 go beside Q rows of accumulators: a power of two, so that it divides the 8
// panels of a block.
constexpr int beside(int rows) {
  const int most = Vec::kAccumulators / rows;
  return most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
}

constexpr int64_t kGroups = kAttentionBlock / 16;  // panels of a block

// Where every 16 positions of a block begin, and those of the next block for fetching ahead.
struct Block {
  const uint8_t* keys[kGroups];
  const uint8_t* values[kGroups];
  const uint8_t* fetch_values[kGroups];
  const uint8_t* fetch_keys[kGroups];
};

// Where to go on fetching keys when so many bytes of a block's values have been read, in whatever
// order: keys are fetched in the order in which they lie, which is much faster (docs/log.md).
EARNEST_INLINE const uint8_t* keysAfter(const Block& block, int64_t read, int64_t panel_bytes) {
  return block.fetch_keys[read / panel_bytes] + read % panel_bytes;
}

// For keys and values that are fetched elsewhere, or not at all.
struct FetchNothing {
  void operator()(int64_t) const {}
};

// Scores of a query to weights; `seen` of them count. Returns what its state is to be multiplied by.
// `fetch` is called with every panel.
template <class Fetch = FetchNothing>
EARNEST_INLINE float softmax(float* s, int64_t seen, float& maximum, float& sum, Fetch fetch = {}) {
  const int64_t end = (seen + 15) / 16 * 16;
  for (int64_t j = seen; j < end; ++j) s[j] = -__builtin_inff();
  Vec::F lanes = Vec::load(s);
  for (int64_t j = 16; j < end; j += 16) lanes = Vec::greater(Vec::load(s + j), lanes);
  const float most = Vec::greatest(lanes), top = most > maximum ? most : maximum;
  const Vec::F negative = Vec::set1(-top);
  lanes = Vec::zero();
  for (int64_t j = 0; j < end; j += 16) {
    const Vec::F p = exponentials(Vec::add(Vec::load(s + j), negative));
    lanes = Vec::add(lanes, p);
    Vec::store(s + j, p);
    fetch(j / 16);
  }
  const float correction = exponential(maximum - top);
  sum = sum * correction + Vec::sum(lanes);
  maximum = top;
  return correction;
}

// The values' scales into the weights of 16 `panels` positions.
template <class Fetch = FetchNothing>
EARNEST_INLINE void scaleWeights(float* weights, int64_t panels, const Block& block,
                                 Fetch fetch = {}) {
  for (int64_t g = 0; g < panels; ++g) {
    fetch(g);
    const Vec::F by = Vec::load(reinterpret_cast<const float*>(block.values[g]));
    Vec::store(weights + 16 * g, Vec::mul(Vec::load(weights + 16 * g), by));
  }
}

}  // namespace
}  // namespace earnest

#include "kernels/attention_floats.inl"
#include "kernels/attention_shorts.inl"
#include "kernels/attention_bytes.inl"

namespace earnest {
namespace {

// Tiles of nearly the same size: 7 queries of at most 6 become 4 and 3.
template <class Kv>
int64_t tilesOf(int64_t queries) {
  return (queries + Kv::kQueries - 1) / Kv::kQueries;
}

template <class Kv, int Q>
EARNEST_INLINE void attendTile(int queries, const Block& block, const int64_t* seen,
                               int64_t channels, const uint8_t* packed, float* state,
                               uint8_t* scratch) {
  if constexpr (Q > 0) {
    if (queries == Q)
      Kv::template attend<Q>(block, seen, channels, packed, state, scratch);
    else
      attendTile<Kv, Q - 1>(queries, block, seen, channels, packed, state, scratch);
  }
}

template <class Kv>
void attendSegmentAs(const Attention& a, int64_t segment, float* states, uint8_t* scratch) {
  const int64_t padded = paddedChannels(a.channels), floats = padded + kState;
  const int64_t begin = segment * kAttentionSegment;
  int64_t end = begin + kAttentionSegment;
  if (end > a.first + a.tokens) end = a.first + a.tokens;
  // Tokens before the segment are left alone.
  const int64_t skipped = begin > a.first ? (begin - a.first) * a.heads : 0;
  const int64_t queries = a.tokens * a.heads - skipped;
  const int64_t tiles = tilesOf<Kv>(queries);
  const int64_t packed_bytes = Kv::packedBytes(a.channels);
  uint8_t* work = scratch + tiles * packed_bytes;
  states += skipped * floats;
  const float* q[Kv::kQueries];
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t from = queries * tile / tiles, to = queries * (tile + 1) / tiles;
    for (int64_t i = from; i < to; ++i) {
      const int64_t query = skipped + i;
      q[i - from] = a.q + query / a.heads * a.q_stride + query % a.heads * a.channels;
      float* state = states + i * floats;
      for (int64_t c = 0; c < floats; ++c) state[c] = 0.0f;
      state[padded] = -__builtin_inff();
    }
    Kv::pack(q, static_cast<int>(to - from), a.channels, a.scale, scratch + tile * packed_bytes);
  }
  const int64_t last = a.first + a.tokens;
  const auto find = [&](int64_t at, const uint8_t** keys, const uint8_t** values) {
    for (int64_t g = 0; g < kGroups && at + 16 * g < last; ++g) {
      const int64_t position = at + 16 * g, slot = position % a.kv.page / 16;
      const uint8_t* page = a.kv.base + a.kv.table[position / a.kv.page] * a.kv.page_stride;
      keys[g] = page + slot * Kv::keyBytes(a.channels);
      values[g] = page + a.kv.values_at + slot * Kv::valueBytes(a.channels);
    }
  };
  Block block;
  const uint8_t* next_keys[kGroups];
  const uint8_t* next_values[kGroups];
  find(begin, next_keys, next_values);
  for (int64_t at = begin; at < end; at += kAttentionBlock) {
    for (int64_t g = 0; g < kGroups && at + 16 * g < last; ++g) {
      block.keys[g] = block.fetch_keys[g] = next_keys[g];
      block.values[g] = block.fetch_values[g] = next_values[g];
    }
    const int64_t next = at + kAttentionBlock;
    find(next, next_keys, next_values);
    // While keys are read, the values of the block are fetched; while those are, the next keys (also
    // of the next segment: mostly the same worker goes on there). For later tiles all lies in cache.
    for (int64_t g = 0; g < kGroups && next + 16 * g < last; ++g)
      block.fetch_keys[g] = next_keys[g];
    bool fetched = false;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t from = queries * tile / tiles, to = queries * (tile + 1) / tiles;
      int64_t seen[Kv::kQueries];
      for (int64_t i = from; i < to; ++i) {
        const int64_t sees = a.first + (skipped + i) / a.heads + 1 - at;
        seen[i - from] = sees < kAttentionBlock ? sees : kAttentionBlock;
      }
      if (seen[to - from - 1] <= 0) continue;
      attendTile<Kv, Kv::kQueries>(static_cast<int>(to - from), block, seen, a.channels,
                                   scratch + tile * packed_bytes, states + from * floats, work);
      if (!fetched) {
        fetched = true;
        for (int64_t g = 0; g < kGroups && at + 16 * g < last; ++g) {
          block.fetch_keys[g] = block.keys[g];
          block.fetch_values[g] = block.keys[g];
        }
      }
    }
  }
}

void attendSegment(const Attention& a, int64_t segment, float* states, uint8_t* scratch) {
  switch (a.type) {
    case kKvF32: return attendSegmentAs<FloatKv<KvF32>>(a, segment, states, scratch);
    case kKvF16: return attendSegmentAs<FloatKv<KvF16>>(a, segment, states, scratch);
    case kKvBf16: return attendSegmentAs<FloatKv<KvBf16>>(a, segment, states, scratch);
    case kKvInt8: return attendSegmentAs<ByteKv>(a, segment, states, scratch);
    case kKvInt16: return attendSegmentAs<ShortKv>(a, segment, states, scratch);
    default: return;
  }
}

template <class Kv>
int64_t scratchOf(int64_t queries, int64_t channels) {
  return tilesOf<Kv>(queries) * Kv::packedBytes(channels) + Kv::kWorkBytes;
}

size_t attendScratchBytes(int64_t queries, int64_t channels) {
  const int64_t floats = scratchOf<FloatKv<KvF32>>(queries, channels);
  const int64_t shorts = scratchOf<ShortKv>(queries, channels);
  const int64_t bytes = scratchOf<ByteKv>(queries, channels);
  const int64_t integers = shorts > bytes ? shorts : bytes;
  return static_cast<size_t>(floats > integers ? floats : integers);
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

void storeHalves(const float* x, int64_t count, uint8_t* out) {
  const auto clamped = [](float v) {
    return v > 65504.0f && v < __builtin_inff()     ? 65504.0f
           : v < -65504.0f && v > -__builtin_inff() ? -65504.0f
                                                    : v;
  };
  alignas(64) float some[16];
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t n = count - i < 16 ? count - i : 16;
    for (int64_t j = 0; j < 16; ++j) some[j] = j < n ? clamped(x[i + j]) : 0.0f;
    alignas(32) uint8_t halves[32];
    Vec::storeHalves(halves, Vec::load(some));
    for (int64_t j = 0; j < 2 * n; ++j) out[2 * i + j] = halves[j];
  }
}

constexpr StepKernels stepKernels = {rmsNorm,       swiglu,        add,
                                     addScaled,     stateFloats,   attendSegment,
                                     attendScratchBytes, mergeState, finishState,
                                     storeHalves};

}  // namespace
}  // namespace earnest
