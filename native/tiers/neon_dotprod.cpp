// 64-bit Arm since 2018 (Cortex-A76, Apple A11): byte dot products.
#include "kernels/vec_neon.h"
#include "kernels/matmul.inl"
#include "kernels/table.inl"

EARNEST_TABLE(kNeonDotprod, "neon-dotprod", peakIntegers)
