// 64-bit Arm since 2021 (Neoverse V1, Apple M2): int8 matrix products for several tokens,
// neon-dotprod for few.
#include "kernels/vec_neon.h"

#include "kernels/i8mm.inl"

#include "kernels/table.inl"

EARNEST_TABLE(kI8mm, "i8mm", peakPairs)
