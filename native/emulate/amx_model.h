// The AMX instructions of kernels/tiles.h as scalar loops, after the operation sections of Intel's
// manual (Software Developer's Manual, volume 2, TDPBSSD and TDPBF16PS). Test builds only.
#pragma once

#include <cstdint>

namespace earnest {
namespace {

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {};
  uint8_t rows[16] = {};
};

struct TileState {
  TileConfig config;
  alignas(64) uint8_t data[8][16][64];
};
thread_local TileState tiles_;

inline void tileConfigure(const TileConfig& config) {
  tiles_.config = config;
  __builtin_memset(tiles_.data, 0, sizeof tiles_.data);
}
inline void tileRelease() { tiles_.config = TileConfig{}; }

template <int kTile>
inline void tileZero() {
  __builtin_memset(tiles_.data[kTile], 0, sizeof tiles_.data[kTile]);
}
template <int kTile>
inline void tileLoad(const void* p, int64_t stride) {
  tileZero<kTile>();
  for (int r = 0; r < tiles_.config.rows[kTile]; ++r)
    __builtin_memcpy(tiles_.data[kTile][r], static_cast<const uint8_t*>(p) + r * stride,
                     tiles_.config.columns[kTile]);
}
template <int kTile>
inline void tileStore(void* p, int64_t stride) {
  for (int r = 0; r < tiles_.config.rows[kTile]; ++r)
    __builtin_memcpy(static_cast<uint8_t*>(p) + r * stride, tiles_.data[kTile][r],
                     tiles_.config.columns[kTile]);
}

// Sizes that the instruction would refuse with a fault.
template <int C, int A, int B>
inline void tileCheck() {
  const TileConfig& c = tiles_.config;
  if (c.rows[C] != c.rows[A] || c.columns[C] != c.columns[B] || c.columns[A] != 4 * c.rows[B] ||
      c.rows[C] == 0)
    __builtin_trap();
}

template <int C, int A, int B>
inline void tileBytes() {
  tileCheck<C, A, B>();
  const TileConfig& c = tiles_.config;
  for (int m = 0; m < c.rows[C]; ++m)
    for (int k = 0; k < c.columns[A] / 4; ++k)
      for (int n = 0; n < c.columns[C] / 4; ++n) {
        int32_t sum;
        __builtin_memcpy(&sum, &tiles_.data[C][m][4 * n], 4);
        for (int i = 0; i < 4; ++i)
          sum += int32_t{static_cast<int8_t>(tiles_.data[A][m][4 * k + i])} *
                 static_cast<int8_t>(tiles_.data[B][k][4 * n + i]);
        __builtin_memcpy(&tiles_.data[C][m][4 * n], &sum, 4);
      }
}

inline float bf16At(const uint8_t* p) {
  uint32_t bits = uint32_t{p[0]} << 16 | uint32_t{p[1]} << 24;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

template <int C, int A, int B>
inline void tileBf16() {
  tileCheck<C, A, B>();
  const TileConfig& c = tiles_.config;
  for (int m = 0; m < c.rows[C]; ++m)
    for (int n = 0; n < c.columns[C] / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < c.columns[A] / 4; ++k) {
        const uint8_t *a = &tiles_.data[A][m][4 * k], *b = &tiles_.data[B][k][4 * n];
        even = __builtin_fmaf(bf16At(a), bf16At(b), even);
        odd = __builtin_fmaf(bf16At(a + 2), bf16At(b + 2), odd);
      }
      __builtin_memcpy(&sum, &tiles_.data[C][m][4 * n], 4);
      sum += even + odd;
      __builtin_memcpy(&tiles_.data[C][m][4 * n], &sum, 4);
    }
}

}  // namespace
}  // namespace earnest
