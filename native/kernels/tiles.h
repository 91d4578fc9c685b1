// The AMX instructions that the kernels use, one function each.
//
// Own assembly instead of <amxtileintrin.h>: gcc 12's _tile_loadconfig says that it reads 8 of the
// 64 bytes of a configuration, so the compiler may drop the stores of the others (llama.cpp crashes
// at its first prompt for that); and the intrinsics take literal numbers only.
// With EARNEST_AMX_MODEL a scalar model takes their place (emulate/amx_model.h), for the tests of
// machines without tiles.
#pragma once

#include <cstdint>

#if EARNEST_AMX_MODEL
#include "emulate/amx_model.h"
#else

namespace earnest {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {};  // bytes of a row
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

inline void tileConfigure(const TileConfig& config) {
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}
inline void tileRelease() { __asm__ volatile("tilerelease"); }

template <int kTile>
inline void tileZero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
inline void tileLoad(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tileStore(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
// C[m][n] += sum over 4 neighbouring bytes, both signed
template <int C, int A, int B>
inline void tileBytes() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
// C[m][n] += (even products in order) + (odd products in order)
template <int C, int A, int B>
inline void tileBf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace earnest

#endif
