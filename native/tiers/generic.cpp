// Any processor: plain C++.
#include "kernels/vec_generic.h"
#include "kernels/matmul.inl"
#include "kernels/table.inl"

EARNEST_TABLE(kGeneric, "generic", peakIntegers)
