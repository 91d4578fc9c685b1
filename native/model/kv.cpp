#include "model/kv.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

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
constexpr int64_t kSome = kScaledChannelsMax;  // channels converted at a time: any scaled head

void convert(const StepKernels& kernels, int32_t type, const float* x, int64_t count,
             uint8_t* out) {
  if (type == kKvF16) return kernels.storeHalves(x, count, out);
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t bits = toBf16(x[i]);
    std::memcpy(out + 2 * i, &bits, 2);
  }
}

// Integers of a head and their scale: NaN where one is not finite, 0 where all nearly are.
template <class T>
float toIntegers(const float* x, int64_t count, uint8_t* out) {
  constexpr float kMost = std::numeric_limits<T>::max();
  float amax = 0;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    finite = finite && std::isfinite(x[i]);
    amax = std::max(amax, std::fabs(x[i]));
  }
  const bool good = finite && amax >= 0x1p-100f;
  const float inverse = good ? kMost / amax : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const T v = good ? static_cast<T>(std::nearbyint(x[i] * inverse)) : T{0};
    std::memcpy(out + i * static_cast<int64_t>(sizeof v), &v, sizeof v);
  }
  return good ? amax / kMost : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
}

// Where channel c of a key or a value of position `lane` lies in the numbers of 16 positions.
int64_t keyPlace(const KvCache& cache, int64_t c, int64_t lane) {
  const int64_t together = cache.paired() ? 2 : cache.type == kKvInt8 ? 4 : 1;
  return 16 * together * (c / together) + together * lane + c % together;
}
int64_t valuePlace(const KvCache& cache, int64_t c, int64_t lane) {
  const int64_t padded = roundUp(cache.channels, 32);
  if (cache.type == kKvInt8) return lane / 4 * 4 * padded + 4 * c + lane % 4;
  if (cache.type == kKvInt16) return lane / 2 * 2 * padded + 2 * c + lane % 2;
  if (cache.type == kKvBf16)
    c = c / 32 * 32 + (c % 32 < 16 ? 2 * (c % 32) : 2 * (c % 32 - 16) + 1);
  return lane * padded + c;
}

// `count` channels from `from` of all heads into the 16 positions of each head at `panel`.
template <int64_t place(const KvCache&, int64_t, int64_t)>
void store(const KvCache& cache, const StepKernels& kernels, uint8_t* panel, int64_t lane,
           int64_t from, int64_t count, const float* x) {
  const int64_t number = cache.number(), C = cache.channels;
  uint8_t converted[2 * kSome];
  const uint8_t* source = reinterpret_cast<const uint8_t*>(x);
  panel += from / C * cache.headBytes();
  int64_t c = from % C;
  for (int64_t done = 0; done < count;) {
    // Up to the end of the head.
    const int64_t some = std::min({kSome, count - done, C - c});
    if (cache.scaled()) {
      const float scale = cache.type == kKvInt8
                              ? toIntegers<int8_t>(x + done, some, converted)
                              : toIntegers<int16_t>(x + done, some, converted);
      std::memcpy(panel + 4 * lane, &scale, 4);
    } else if (cache.type != kKvF32) {
      convert(kernels, cache.type, x + done, some, converted);
    }
    if (cache.type != kKvF32) source = converted;
    uint8_t* numbers = panel + cache.scales();
    for (int64_t i = 0; i < some; ++i, source += number)
      std::memcpy(numbers + number * place(cache, c + i, lane), source, number);
    done += some;
    c += some;
    if (c == C) c = 0, panel += cache.headBytes();
  }
}

}  // namespace

void KvCache::storeKeys(const StepKernels& kernels, int64_t layer, int64_t at_page, int64_t slot,
                        int64_t from, int64_t count, const float* x) const {
  uint8_t* panel = data + (layer * pages + at_page) * pageBytes() + slot / 16 * keyPanel();
  store<keyPlace>(*this, kernels, panel, slot % 16, from, count, x);
}

void KvCache::storeValues(const StepKernels& kernels, int64_t layer, int64_t at_page,
                          int64_t slot, int64_t from, int64_t count, const float* x) const {
  uint8_t* panel = data + (layer * pages + at_page) * pageBytes() + keyBytes();
  store<valuePlace>(*this, kernels, panel + slot / 16 * valuePanel(), slot % 16, from, count, x);
}

}  // namespace earnest
