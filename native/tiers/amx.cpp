// x86 servers since 2023 (Sapphire Rapids): 16 x 16 tiles for many tokens, avx512vnni for few, and
// for all that is no matrix product.
#define EARNEST_AMX 1
#include "kernels/vec_avx512.h"

#include "kernels/amx.inl"

#include "kernels/activations.inl"
#include "kernels/probes.inl"

namespace earnest {

extern const StepKernels kAvx512VnniStep;
extern const KernelTable kAmx;
const KernelTable kAmx = {"amx",        quantize,    prepare,   matmul,
                          scratchBytes, readStreams, peakTiles, &kAvx512VnniStep};

}  // namespace earnest
