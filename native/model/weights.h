// A model as the step sees it: numbers, and pointers to memory that somebody else owns.
#pragma once

#include <cstdint>
#include <vector>

#include "earnest/kernels.h"

namespace earnest {

// A weight matrix in panels, with the bias of its layer if there is one.
struct Matrix {
  const uint8_t* panels = nullptr;
  int32_t codec = 0;
  int64_t rows = 0;
  int64_t columns = 0;  // a multiple of 32: plain codecs are padded with zeros
  const float* bias = nullptr;

  explicit operator bool() const { return panels != nullptr; }
  int64_t panelCount() const { return (rows + kPanelRows - 1) / kPanelRows; }
};

// Gate and up projections `[width, hidden]` and the way back.
struct FeedForward {
  Matrix gate, up, down;

  explicit operator bool() const { return bool(down); }
};

struct Layer {
  const float* input_norm = nullptr;
  const float* post_norm = nullptr;
  Matrix q, k, v, o;
  // What every token goes through: the dense block, or the fused shared experts (there may be none).
  FeedForward shared;
  // Mixture of experts; `experts` is empty in a dense layer. The router is float32.
  Matrix router;
  const float* correction = nullptr;  // [experts], for the selection only
  std::vector<FeedForward> experts;
};

struct Model {
  int64_t vocab = 0, hidden = 0, heads = 0, kv_heads = 0, channels = 0;
  int64_t active = 0;  // experts per token
  float eps = 0, norm_min = 0;
  int32_t planes = kA8;  // how activations meet block codecs
  Matrix embedding, head;
  const float* final_norm = nullptr;
  std::vector<Layer> layers;

  int64_t qSize() const { return heads * channels; }
  int64_t kvSize() const { return kv_heads * channels; }
  int64_t experts() const;  // of the layer that has most
};

// Row `row` of a matrix, decoded to `columns` floats exactly as the numpy codecs do.
void decodeRow(const Matrix& matrix, int64_t row, int64_t columns, float* out);

// Softmax in float32, selection by probability + correction, weights renormalised over the chosen
// ones. `probability` is the logits when called. Equal scores: the lower expert first.
void selectExperts(float* probability, const float* correction, int64_t experts, int64_t active,
                   float norm_min, int32_t* chosen, float* weights);

inline int64_t roundUp(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

}  // namespace earnest
