// What this tier can read from memory and multiply: the yardsticks of `bench` and `doctor`.
#pragma once

#include "kernels/panel_codecs.inl"

namespace earnest {
namespace {

// Byte sums would need more than loads can give; the lanes' own products do: one add a load.
uint64_t readStreams(const uint8_t* data, size_t bytes, int streams) {
  constexpr int kMost = 4;
  const int n = streams < 1 ? 1 : streams > kMost ? kMost : streams;
  const size_t part = bytes / n / 512 * 512;
  uint64_t total[kMost][8] = {};
  const uint64_t* at[kMost];
  for (int s = 0; s < n; ++s) at[s] = reinterpret_cast<const uint64_t*>(data + s * part);
  for (size_t i = 0; i < part / 8; i += 32)
    for (int s = 0; s < n; ++s) {
      const uint64_t* p = at[s] + i;
      for (int j = 0; j < 8; ++j) total[s][j] += (p[j] ^ p[j + 8]) + (p[j + 16] ^ p[j + 24]);
    }
  uint64_t sum = 0;
  for (int s = 0; s < n; ++s)
    for (int j = 0; j < 8; ++j) sum += total[s][j];
  return sum;
}

// Independent chains, with weights that the compiler must take to differ: it would otherwise find
// out that all chains compute the same and keep one.
[[maybe_unused]] uint64_t peakIntegers(uint64_t rounds) {
  constexpr int kChains = 8;
  alignas(64) uint8_t weights[kChains * 64];
  alignas(64) int8_t values[32];
  for (int i = 0; i < kChains * 64; ++i) weights[i] = static_cast<uint8_t>(i * 7 & 15);
  for (int i = 0; i < 32; ++i) values[i] = static_cast<int8_t>(i - 16);
  __asm__ volatile("" : : "r"(weights), "r"(values) : "memory");
  Vec::B w[kChains];
  unroll<0, kChains>([&](auto c) EARNEST_INLINE_LAMBDA {
    w[c.value] = Vec::loadB(weights + 64 * c.value);
  });
  Vec::F all = Vec::zero();
  for (uint64_t i = 0; i < rounds; ++i) {
    Vec::Sum<15, false, 1> sum[kChains];
    unroll<0, 8>([&](auto g) EARNEST_INLINE_LAMBDA {
      const Vec::A a = Vec::broadcast(values + 4 * g.value);
      unroll<0, kChains>([&](auto c) EARNEST_INLINE_LAMBDA {
        sum[c.value].template add<g.value>(w[c.value], a);
      });
    });
    __asm__ volatile("" : : "r"(values) : "memory");
    Vec::I total = Vec::zeroI();
    unroll<0, kChains>([&](auto c) EARNEST_INLINE_LAMBDA {
      total = Vec::addI(total, sum[c.value].total());
    });
    all = Vec::add(all, Vec::toFloat(total));
  }
  alignas(64) float out[16];
  Vec::store(out, all);
  volatile float sink = out[0];
  (void)sink;
  return rounds * kChains * 8 * 64 * 2;
}

}  // namespace
}  // namespace earnest
