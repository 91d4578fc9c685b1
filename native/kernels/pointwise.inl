// What happens to single numbers and rows between the matrix products.
//
// Sums run over 16 lanes, lane i holding elements i, i + 16, ..., and then over a fixed tree, so a
// row's result depends on the row alone. Loops over plain arrays are left to the compiler.
#pragma once

#include "earnest/step_kernels.h"
#include "kernels/panel_codecs.inl"

namespace earnest {
namespace {

// e^x with an error of at most 2 units in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, and the
// Taylor polynomial of degree 7 of e^r (remainder 5e-9). Below -87 it is 0 (no subnormals), above
// 88 it stays e^88; NaN stays NaN.
EARNEST_INLINE float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float bounded = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
  const float shifted = bounded * 1.44269504f + kRound;
  const float n = shifted - kRound;
  // 355/512 has few enough bits for n * 355/512 to be exact.
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  bits = static_cast<int32_t>((static_cast<uint32_t>(bits) - 0x4b400000u + 127u) << 23);
  float power;
  __builtin_memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : p * power;
}

// The same for numbers up to 0, with fma.
EARNEST_INLINE Vec::F exponentials(Vec::F x) {
  const Vec::F least = Vec::set1(-87.0f), round = Vec::set1(12582912.0f);
  const Vec::F bounded = Vec::greater(least, x);  // NaN stays
  const Vec::F shifted = Vec::fma(bounded, Vec::set1(1.44269504f), round);
  const Vec::F n = Vec::add(shifted, Vec::neg(round));
  Vec::F r = Vec::fma(n, Vec::set1(-0.693359375f), bounded);
  r = Vec::fma(n, Vec::set1(2.12194440e-4f), r);
  Vec::F p = Vec::set1(1.98412698e-4f);
  p = Vec::fma(p, r, Vec::set1(1.38888889e-3f));
  p = Vec::fma(p, r, Vec::set1(8.33333333e-3f));
  p = Vec::fma(p, r, Vec::set1(4.16666667e-2f));
  p = Vec::fma(p, r, Vec::set1(1.66666667e-1f));
  p = Vec::fma(p, r, Vec::set1(0.5f));
  p = Vec::fma(p, r, Vec::set1(1.0f));
  p = Vec::fma(p, r, Vec::set1(1.0f));
  return Vec::zeroBelow(x, least, Vec::timesPower(p, shifted));
}

void rmsNorm(const float* x, const float* weight, int64_t columns, int64_t padded, float eps,
             float* out) {
  Vec::F sum[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  int64_t i = 0;
  for (; i + 64 <= columns; i += 64)
    for (int j = 0; j < 4; ++j) {
      const Vec::F v = Vec::load(x + i + 16 * j);
      sum[j] = Vec::fma(v, v, sum[j]);
    }
  alignas(64) float rest[16] = {};
  for (; i + 16 <= columns; i += 16) {
    const Vec::F v = Vec::load(x + i);
    sum[0] = Vec::fma(v, v, sum[0]);
  }
  for (int j = 0; i + j < columns; ++j) rest[j] = x[i + j] * x[i + j];
  const Vec::F both = Vec::add(Vec::add(sum[0], sum[1]), Vec::add(sum[2], sum[3]));
  const float mean = Vec::sum(Vec::add(both, Vec::load(rest))) / static_cast<float>(columns);
  const float inverse = 1.0f / __builtin_sqrtf(mean + eps);
  for (i = 0; i < columns; ++i) out[i] = weight[i] * (x[i] * inverse);
  for (; i < padded; ++i) out[i] = 0.0f;
}

void swiglu(float* __restrict gate, const float* __restrict up, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

void add(float* __restrict x, const float* __restrict y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] += y[i];
}

void addScaled(float* __restrict x, const float* __restrict y, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] += factor * y[i];
}

}  // namespace
}  // namespace earnest
