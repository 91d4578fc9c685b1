// 64-bit Arm since 2018 (Cortex-A76, Apple A11): byte dot products.
#include "kernels/vec_neon.h"
#include "kernels/table.inl"

#define EARNEST_PEAK peakIntegers
EARNEST_TABLE(kNeonDotprod, "neon-dotprod")
