// x86 laptops since 2021 (Alder Lake, Zen 5): as avx2, with byte dot products.
#define EARNEST_AVXVNNI 1
#include "kernels/vec_avx2.h"
#include "kernels/matmul.inl"
#include "kernels/table.inl"

EARNEST_TABLE(kAvxVnni, "avxvnni", peakIntegers)
