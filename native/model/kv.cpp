#include "model/kv.h"

#include <algorithm>
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

// Numbers of the type, one after the other.
constexpr int64_t kSome = 512;  // channels converted at a time

void convert(const StepKernels& kernels, int32_t type, const float* x, int64_t count,
             uint8_t* out) {
  if (type == kKvF16) return kernels.storeHalves(x, count, out);
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t bits = toBf16(x[i]);
    std::memcpy(out + 2 * i, &bits, 2);
  }
}

// Where channel c of a key lies in its panel, in numbers; and of a value in its row.
int64_t keyPlace(int32_t type, int64_t c, int64_t lane) {
  return type == kKvBf16 ? 32 * (c / 2) + 2 * lane + c % 2 : 16 * c + lane;
}
int64_t valuePlace(int32_t type, int64_t c) {
  if (type != kKvBf16) return c;
  return c / 32 * 32 + (c % 32 < 16 ? 2 * (c % 32) : 2 * (c % 32 - 16) + 1);
}

// Calls place(head, channel, number, bytes of it) for `count` channels from `from`.
template <class Place>
void forNumbers(const KvCache& cache, const StepKernels& kernels, int64_t from, int64_t count,
                const float* x, Place place) {
  const int64_t number = cache.number();
  uint8_t converted[2 * kSome];
  for (int64_t done = 0; done < count; done += kSome) {
    const int64_t some = std::min(kSome, count - done);
    const uint8_t* source = reinterpret_cast<const uint8_t*>(x + done);
    if (cache.type != kKvF32) {
      convert(kernels, cache.type, x + done, some, converted);
      source = converted;
    }
    int64_t head = (from + done) / cache.channels, c = (from + done) % cache.channels;
    for (int64_t i = 0; i < some; ++i) {
      place(head, c, source + i * number);
      if (++c == cache.channels) c = 0, ++head;
    }
  }
}

}  // namespace

void KvCache::storeKeys(const StepKernels& kernels, int64_t layer, int64_t at_page, int64_t slot,
                        int64_t from, int64_t count, const float* x) const {
  uint8_t* keys = data + (layer * pages + at_page) * pageBytes();
  keys += slot / 16 * 16 * channels * number();
  const int64_t lane = slot % 16;
  forNumbers(*this, kernels, from, count, x, [&](int64_t head, int64_t c, const uint8_t* bits) {
    uint8_t* at = keys + head * headBytes() + number() * keyPlace(type, c, lane);
    std::memcpy(at, bits, number());
  });
}

void KvCache::storeValues(const StepKernels& kernels, int64_t layer, int64_t at_page,
                          int64_t slot, int64_t from, int64_t count, const float* x) const {
  uint8_t* rows = data + (layer * pages + at_page) * pageBytes() + keyBytes();
  rows += slot * valueRow();
  forNumbers(*this, kernels, from, count, x, [&](int64_t head, int64_t c, const uint8_t* bits) {
    std::memcpy(rows + head * headBytes() + number() * valuePlace(type, c), bits, number());
  });
}

}  // namespace earnest
