// 64-bit Arm since 2021 (Neoverse V1, Apple M2): int8 matrix products. Uses the dot products so
// far; smmla would double the integer rate of prefill.
#include "kernels/vec_neon.h"
#include "kernels/matmul.inl"
#include "kernels/table.inl"

EARNEST_TABLE(kI8mm, "i8mm", peakIntegers)
