// Activations to integers: 32 share a scale. The same bits from all tiers.
//
//   scale = amax / limit, v = rint(x * (limit / amax)), ties to even
//   limit = 127 (one plane) or 16256 = 127 * 128 (two planes: v = 128 hi + lo, lo in [-64, 63])
// A block whose amax is below 2^-100 is zero: its reciprocal would overflow. A block with an
// infinity or a NaN gets a NaN for its scale, so that what depends on it is NaN too.
#pragma once

#include "earnest/kernels.h"
#include "kernels/panel_codecs.inl"

namespace earnest {
namespace {

constexpr float kLeastAmax = 0x1p-100f;
constexpr float kRoundToInteger = 12582912.0f;  // adding 1.5 * 2^23 leaves the nearest integer,
constexpr uint32_t kRoundToIntegerBits = 0x4b400000;  // ties to even, in the lowest bits

// Integers as their bits: beside a NaN they may be anything, and nothing of them may overflow.
EARNEST_INLINE void storeIntegers(const uint32_t (&v)[32], int32_t planes, int8_t* values) {
  if (planes == kA15) {
    for (int i = 0; i < 32; ++i) {
      values[i] = static_cast<int8_t>((v[i] + 64) >> 7);
      values[32 + i] = static_cast<int8_t>(((v[i] + 64) & 127) - 64);
    }
  } else {
    for (int i = 0; i < 32; ++i) values[i] = static_cast<int8_t>(v[i]);
  }
}

void quantizeBlock(const float* x, int32_t planes, float limit, int8_t* values,
                   ActivationBlock& block) {
  // The bits of |x| order as |x| does, and put infinities and NaNs above everything.
  int32_t largest = 0;
  for (int i = 0; i < 32; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float amax;
  __builtin_memcpy(&amax, &largest, 4);
  if (largest >= 0x7f800000 || amax < kLeastAmax) {
    for (int i = 0; i < 32 * planes; ++i) values[i] = 0;
    const float scale = largest >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
    block = {scale, scale, 0, 0};
    return;
  }
  const float inverse = limit / amax;
  uint32_t v[32];
  for (int i = 0; i < 32; ++i) {
    const float rounded = x[i] * inverse + kRoundToInteger;
    __builtin_memcpy(v + i, &rounded, 4);
    v[i] -= kRoundToIntegerBits;
  }
  int32_t first = 0, second = 0;
  for (int i = 0; i < 16; ++i) first += static_cast<int32_t>(v[i]);
  for (int i = 16; i < 32; ++i) second += static_cast<int32_t>(v[i]);
  storeIntegers(v, planes, values);
  const float scale = amax / limit;
  block = {scale, scale * static_cast<float>(first + second), first + second, first};
}

// 8 blocks: their maxima and sums, which run across lanes, are found together. The same bits: the
// sums are of integers up to 2^14, exact in float32, and NaN where any x is no finite number; such
// blocks are done again.
void quantize8(const float* x, int32_t planes, float limit, int8_t* values,
               ActivationBlock* blocks) {
  const Vec::F round = Vec::set1(kRoundToInteger), back = Vec::set1(-kRoundToInteger);
  Vec::F sizes[8], firsts[8], seconds[8];
  float amax[8], inverse[8], scale[8], first[8], second[8];
  for (int b = 0; b < 8; ++b)
    sizes[b] = Vec::greater(Vec::magnitude(Vec::load(x + 32 * b)),
                            Vec::magnitude(Vec::load(x + 32 * b + 16)));
  Vec::greatestOf8(sizes, amax);
  for (int b = 0; b < 8; ++b) inverse[b] = limit / amax[b];
  for (int b = 0; b < 8; ++b) scale[b] = amax[b] / limit;
  for (int b = 0; b < 8; ++b) {
    const Vec::F factor = Vec::set1(inverse[b]);
    const Vec::F low = Vec::add(Vec::mul(Vec::load(x + 32 * b), factor), round);
    const Vec::F high = Vec::add(Vec::mul(Vec::load(x + 32 * b + 16), factor), round);
    firsts[b] = Vec::add(low, back);
    seconds[b] = Vec::add(high, back);
    alignas(64) float rounded[32];
    Vec::store(rounded, low);
    Vec::store(rounded + 16, high);
    uint32_t v[32];
    __builtin_memcpy(v, rounded, sizeof v);
    for (int i = 0; i < 32; ++i) v[i] -= kRoundToIntegerBits;
    storeIntegers(v, planes, values + 32 * planes * b);
  }
  Vec::sumOf8(firsts, first);
  Vec::sumOf8(seconds, second);
  for (int b = 0; b < 8; ++b) {
    const float sum = first[b] + second[b];
    if (!(amax[b] >= kLeastAmax) || sum != sum)
      quantizeBlock(x + 32 * b, planes, limit, values + 32 * planes * b, blocks[b]);
    else
      blocks[b] = {scale[b], scale[b] * sum, static_cast<int32_t>(sum),
                   static_cast<int32_t>(first[b])};
  }
}

void quantize(const float* x, int64_t columns, int32_t planes, int8_t* values,
              ActivationBlock* blocks) {
  const float limit = planes == kA15 ? 16256.0f : 127.0f;
  const int64_t count = columns / kBlock;
  int64_t b = 0;
  for (; b + 8 <= count; b += 8)
    quantize8(x + kBlock * b, planes, limit, values + kBlock * planes * b, blocks + b);
  for (; b < count; ++b)
    quantizeBlock(x + kBlock * b, planes, limit, values + kBlock * planes * b, blocks[b]);
}

void prepare(const float* x, int64_t columns, int32_t codec, float* out) {
#if EARNEST_AMX
  // The tiles multiply bf16 by bf16, so in this tier the activations of bf16 weights are rounded
  // to bf16 (ties to even) in decode as well.
  if (codec == kBf16) {
    for (int64_t i = 0; i < columns; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, x + i, 4);
      const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
      bits = nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1);
      bits &= 0xffff0000u;
      __builtin_memcpy(out + i, &bits, 4);
    }
    return;
  }
#endif
  (void)codec;
  for (int64_t i = 0; i < columns; ++i) out[i] = x[i];
}

}  // namespace
}  // namespace earnest
