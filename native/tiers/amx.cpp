// x86 servers since 2023 (Sapphire Rapids): 16 x 16 tiles for many tokens, avx512vnni for few.
#define EARNEST_AMX 1
#include "kernels/vec_avx512.h"

#include "kernels/amx.inl"

#include "kernels/table.inl"

EARNEST_TABLE(kAmx, "amx", peakTiles)
