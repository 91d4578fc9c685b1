// Activations to integers: 32 share a scale. Plain loops that every compiler vectorises, so one
// body for all tiers and the same bits from all of them.
//
//   scale = amax / limit, v = rint(x * (limit / amax)), ties to even
//   limit = 127 (one plane) or 16256 = 127 * 128 (two planes: v = 128 hi + lo, lo in [-64, 63])
// A block whose amax is below 2^-100 is zero: its reciprocal would overflow. A block with an
// infinity or a NaN gets a NaN for its scale, so that what depends on it is NaN too.
#pragma once

#include "earnest/kernels.h"

namespace earnest {
namespace {

void quantize(const float* x, int64_t columns, int32_t planes, int8_t* values,
              ActivationBlock* blocks) {
  const float limit = planes == kA15 ? 16256.0f : 127.0f;
  for (int64_t b = 0; b < columns / kBlock; ++b, x += kBlock, values += kBlock * planes) {
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
    ActivationBlock& block = blocks[b];
    if (largest >= 0x7f800000 || amax < 0x1p-100f) {
      for (int i = 0; i < 32 * planes; ++i) values[i] = 0;
      const float scale = largest >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
      block = {scale, scale, 0, 0};
      continue;
    }
    const float inverse = limit / amax;
    // Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the lowest bits.
    constexpr float kRound = 12582912.0f;
    constexpr int32_t kRoundBits = 0x4b400000;
    int32_t v[32];
    for (int i = 0; i < 32; ++i) {
      const float rounded = x[i] * inverse + kRound;
      int32_t bits;
      __builtin_memcpy(&bits, &rounded, 4);
      v[i] = bits - kRoundBits;
    }
    int32_t first = 0, second = 0;
    for (int i = 0; i < 16; ++i) first += v[i];
    for (int i = 16; i < 32; ++i) second += v[i];
    if (planes == kA15) {
      for (int i = 0; i < 32; ++i) {
        const int32_t high = (v[i] + 64) >> 7;
        values[i] = static_cast<int8_t>(high);
        values[32 + i] = static_cast<int8_t>(v[i] - high * 128);
      }
    } else {
      for (int i = 0; i < 32; ++i) values[i] = static_cast<int8_t>(v[i]);
    }
    const float scale = amax / limit;
    block = {scale, scale * static_cast<float>(first + second), first + second, first};
  }
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
