// Where keys and values of past tokens lie: [layer][page][kv head][keys | values], see KvView.
#pragma once

#include "earnest/step_kernels.h"
#include "model/weights.h"

namespace earnest {

struct KvCache {
  uint8_t* data = nullptr;
  int32_t type = kKvBf16;
  int64_t pages = 0;
  int64_t page = 0;  // positions in one, a multiple of 16
  int64_t kv_heads = 0, channels = 0;

  int64_t number() const { return type == kKvF32 ? 4 : type == kKvInt8 ? 1 : 2; }
  // Two channels of a key beside each other.
  bool paired() const { return type == kKvBf16 || type == kKvInt16; }
  bool scaled() const { return type == kKvInt8 || type == kKvInt16; }
  // Of 16 positions, with their scales.
  int64_t scales() const { return scaled() ? 64 : 0; }
  int64_t keyPanel() const {
    return scales() + 16 * number() * (type == kKvInt8 ? roundUp(channels, 4) : channels);
  }
  int64_t valuePanel() const { return scales() + 16 * number() * roundUp(channels, 32); }
  int64_t keyBytes() const { return page / 16 * keyPanel(); }
  int64_t headBytes() const { return keyBytes() + page / 16 * valuePanel(); }
  int64_t pageBytes() const { return kv_heads * headBytes(); }
  int64_t bytes(int64_t layers) const { return layers * pages * pageBytes(); }

  KvView view(int64_t layer, int64_t head, const int32_t* table) const {
    return {data + layer * pages * pageBytes() + head * headBytes(), pageBytes(), keyBytes(), table,
            page};
  }
  // `count` channels from `from` of all key heads side by side (of a token at `slot` of a page).
  // Integers share a scale per head: whole heads only.
  void storeKeys(const StepKernels& kernels, int64_t layer, int64_t at_page, int64_t slot,
                 int64_t from, int64_t count, const float* x) const;
  void storeValues(const StepKernels& kernels, int64_t layer, int64_t at_page, int64_t slot,
                   int64_t from, int64_t count, const float* x) const;
};

}  // namespace earnest
