// x86 servers since 2019 (Cascade Lake), Zen 4: 512-bit registers with byte dot products.
#include "kernels/vec_avx512.h"
#include "kernels/matmul.inl"
#include "kernels/table.inl"

EARNEST_TABLE(kAvx512Vnni, "avx512vnni", peakIntegers)
