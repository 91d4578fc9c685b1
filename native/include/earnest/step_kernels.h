// Kernels of the forward step beside the matrix products: norm, rotation, SwiGLU, attention. One
// `StepKernels` per instruction-set tier, reached through `KernelTable::step`. As in kernels.h they
// own neither threads nor memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace earnest {

// How keys and values are kept.
enum KvType : int32_t { kKvF32, kKvBf16, kKvF16, kKvInt8, kKvInt16 };

// Channels of a head kept as integers, at most. Of 8 bits: 2^7 * 2^14 * 2^10 is a 32-bit sum.
inline constexpr int64_t kScaledChannelsMax = 1000;

// Positions that attention works on together, counted from position 0 of a sequence. Neither the
// batch, nor the chunk, nor the number of threads changes where they lie: that fixes the order of
// all float32 operations of a query.
inline constexpr int64_t kAttentionBlock = 128;    // share one maximum of the online softmax
inline constexpr int64_t kAttentionSegment = 1024;  // start from nothing; merged in order

// The keys and values of one key/value head of one sequence in one layer, in pages of `page`
// positions (a multiple of 16).
//   keys    16 positions are a panel of kernels.h (a lane is a position, columns are channels):
//           [page / 16][C * 16 numbers]
//   values  a row per position, channels padded to a multiple of 32 with zeros; bf16 rows hold
//           channels i and 16 + i of every 32 beside each other, as their reader wants them
// As integers, 16 positions begin with their float32 scales, x ~ scale * integer. They follow as
//           16 bits                                 8 bits
//   keys    [C / 2][16 positions][2 channels]       [C / 4][16 positions][4 channels]
//   values  [8][channels][2 positions]              [4][channels][4 positions]
// with channels of 8-bit keys padded to a multiple of 4, those of values as above.
struct KvView {
  const uint8_t* base;   // of this layer and head, in page 0
  int64_t page_stride;   // bytes from a page to the next
  int64_t values_at;     // bytes from a page's keys to its values
  const int32_t* table;  // page numbers of the sequence
  int64_t page;          // positions in one
};

// Consecutive queries of one sequence, and the heads that share one key/value head.
struct Attention {
  KvView kv;
  int32_t type;      // KvType
  int32_t heads;     // query heads that read this key/value head
  int32_t channels;  // C, even
  int64_t tokens;
  int64_t first;     // position of the first query
  float scale;       // of the scores
  const float* q;    // rotated; token t, head g at q + t * q_stride + g * channels
  int64_t q_stride;
};

struct StepKernels {
  // out = weight * (x / sqrt(mean(x^2) + eps)), `columns` of them, then zeros up to `padded`.
  void (*rmsNorm)(const float* x, const float* weight, int64_t columns, int64_t padded, float eps,
                  float* out);
  // gate = gate / (1 + exp(-gate)) * up
  void (*swiglu)(float* gate, const float* up, int64_t count);
  // x += y
  void (*add)(float* x, const float* y, int64_t count);
  // x += factor * y, rounded twice
  void (*addScaled)(float* x, const float* y, float factor, int64_t count);

  // Floats of the state of a query head: sums of values, then the maximum and the sum of weights.
  int64_t (*stateFloats)(int64_t channels);
  // The states of all queries and heads, [tokens][heads][stateFloats], over the positions of one
  // segment that each may see. Tokens that see none of them are left alone.
  void (*attendSegment)(const Attention& a, int64_t segment, float* states, uint8_t* scratch);
  // For `queries` = tokens * heads; aligned to 64.
  size_t (*attendScratchBytes)(int64_t queries, int64_t channels);
  // `into` after what it has seen and then what `from` has seen.
  void (*mergeState)(float* into, const float* from, int64_t channels);
  // out[c] = values of a state over its sum.
  void (*finishState)(const float* state, int64_t channels, float* out);
  // To half floats, ties to even. What is finite stays so: beyond 65504 it is that.
  void (*storeHalves)(const float* x, int64_t count, uint8_t* out);
};

}  // namespace earnest
