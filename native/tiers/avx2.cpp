// x86 since 2013 (Haswell, Zen): 256-bit registers, fma, f16c.
#include "kernels/vec_avx2.h"
#include "kernels/table.inl"

#define EARNEST_PEAK peakIntegers
EARNEST_TABLE(kAvx2, "avx2")
