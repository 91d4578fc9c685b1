// The whole contract between the kernels and everything above them.
//
// A kernel owns neither threads nor memory: it is told which part of the work is its own and where
// its scratch lies. A `KernelTable` holds one instruction-set tier; no entry is ever null.
//
// Included by the tier translation units, so: no standard library beyond <cstdint> and <cstddef>,
// and no inline function that another translation unit could also emit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace earnest {

// Order and names are those of `codecNames` in bind/module.cpp and of docs/formats/panel.md.
enum Codec : int32_t { kF32, kF16, kBf16, kQ8_0, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ4_K, kQ5_K, kQ6_K };
inline constexpr int kCodecs = 11;

inline constexpr int64_t kPanelRows = 16;
inline constexpr int64_t kBlock = 32;  // columns per activation scale; fp32 sums advance by these

// How activations meet block codecs. Every 32 of them share a scale and become integers v:
//   kA8   v in [-127, 127], one int8 plane (bf16 weights: a tier may round activations to bf16)
//   kA15  v in [-16256, 16256] = 128 hi + lo, two int8 planes: 128 times finer, twice the products
enum Activation : int32_t { kA8 = 1, kA15 = 2 };

// What belongs to 32 activations of a token besides their integers.
struct ActivationBlock {
  float scale;       // x ~ scale * v; NaN where the 32 held an infinity or a NaN
  float scaled_sum;  // scale * float(sum), for codecs whose weights have a minimum
  int32_t sum;       // of the 32 integers v, for codecs whose weights have an offset
  int32_t sum_first; // of the first 16, for codecs with a scale per 16
};

// T rows of activations, ready for the kernels. Block codecs read `values` and `blocks`, plain
// codecs read `floats`; the other may be null.
struct Activations {
  int64_t tokens;
  int64_t columns;                // K, a multiple of 32
  int32_t planes;                 // 1 or 2, an `Activation`
  const int8_t* values;           // [T][K / 32][planes][32]
  const ActivationBlock* blocks;  // [T][K / 32]
  const float* floats;            // [T][K]
  const int32_t* select;          // rows to use, [tokens] (MoE: the tokens of an expert), or null
};

// out[t][n] = sum_k W[n][k] * x[t][k], for the rows of W in panels [begin, end).
// `out` row t starts at out + t * out_stride; only the first `rows` columns of it are written.
struct Matmul {
  const uint8_t* panels;  // first panel of the matrix
  int32_t codec;
  int64_t rows;     // N, without the padding of the last panel
  int64_t columns;  // K, with the padding of plain codecs
  Activations x;
  float* out;
  int64_t out_stride;
};

struct StepKernels;

struct KernelTable {
  const char* name;
  // One row of x to integers. `columns` is a multiple of 32 (pad with zeros).
  void (*quantize)(const float* x, int64_t columns, int32_t planes, int8_t* values,
                   ActivationBlock* blocks);
  // One row of x as the plain codec's kernel wants it (rounded to bf16 where tiles do that).
  void (*prepare)(const float* x, int64_t columns, int32_t codec, float* out);
  // `scratch` has `scratchBytes(columns, tokens)` bytes, aligned to 64, one per thread.
  void (*matmul)(const Matmul& m, int64_t panel_begin, int64_t panel_end, void* scratch);
  size_t (*scratchBytes)(int64_t columns, int64_t tokens);
  // Sum of a buffer, in `streams` parts read side by side: what memory can give this tier.
  uint64_t (*read)(const uint8_t* data, size_t bytes, int streams);
  // `rounds` rounds of independent products of this tier's matrix kernels, to measure the integer
  // rate; returns the multiplications and additions done.
  uint64_t (*peak)(uint64_t rounds);
  // Norm, rotation, SwiGLU, attention: step_kernels.h.
  const StepKernels* step;
};

// Bytes of a panel block of each codec, and its columns. Defined in core/codecs.cpp.
struct PanelShape {
  const char* name;
  int32_t block_columns;
  int32_t block_bytes;
};
extern const PanelShape kPanelShapes[kCodecs];

// Bytes of one panel of a matrix with (padded) K columns.
int64_t panelBytes(int32_t codec, int64_t columns);

}  // namespace earnest
