// Any processor: plain C++.
#include "kernels/vec_generic.h"
#include "kernels/table.inl"

#define EARNEST_PEAK peakIntegers
EARNEST_TABLE(kGeneric, "generic")
