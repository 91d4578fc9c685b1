#include "model/kv.h"

#include <cstring>

namespace earnest {
namespace {

// Nearest bf16, ties to even.
uint16_t toBf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

void KvCache::storeKeys(int64_t layer, int64_t at_page, int64_t slot, int64_t from, int64_t count,
                        const float* x) const {
  uint8_t* base = data + (layer * pages + at_page) * pageBytes();
  const int64_t lane = slot % 16, panel = slot / 16 * 16 * channels * number();
  uint8_t* keys = base + from / channels * headBytes() + panel;
  int64_t c = from % channels;
  for (int64_t i = 0; i < count; ++i) {
    if (type == kKvF32) {
      std::memcpy(keys + 4 * (16 * c + lane), x + i, 4);
    } else {
      const uint16_t bits = toBf16(x[i]);
      std::memcpy(keys + 2 * (32 * (c / 2) + 2 * lane + c % 2), &bits, 2);
    }
    if (++c == channels) {
      c = 0;
      keys += headBytes();
    }
  }
}

void KvCache::storeValues(int64_t layer, int64_t at_page, int64_t slot, int64_t from, int64_t count,
                          const float* x) const {
  uint8_t* base = data + (layer * pages + at_page) * pageBytes();
  uint8_t* row = base + from / channels * headBytes() + keyBytes() + slot * valueRow();
  int64_t c = from % channels;
  for (int64_t i = 0; i < count; ++i) {
    if (type == kKvF32) {
      std::memcpy(row + 4 * c, x + i, 4);
    } else {
      const uint16_t bits = toBf16(x[i]);
      const int64_t place = c / 32 * 32 + (c % 32 < 16 ? 2 * (c % 32) : 2 * (c % 32 - 16) + 1);
      std::memcpy(row + 2 * place, &bits, 2);
    }
    if (++c == channels) {
      c = 0;
      row += headBytes();
    }
  }
}

}  // namespace earnest
