// x86 since 2013 (Haswell, Zen): 256-bit registers, fma, f16c.
#include "kernels/vec_avx2.h"
#include "kernels/matmul.inl"
#include "kernels/table.inl"

EARNEST_TABLE(kAvx2, "avx2", peakIntegers)
