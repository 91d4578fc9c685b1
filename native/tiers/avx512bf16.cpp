// Cooper Lake (2020), Zen 4: dot products of bf16 pairs, avx512vnni for all else.
#include "kernels/vec_avx512.h"

#include "kernels/bf16_pairs.inl"

#include "kernels/activations.inl"
#include "kernels/probes.inl"

namespace earnest {

extern const StepKernels kAvx512VnniStep;
extern const KernelTable kAvx512Bf16;
const KernelTable kAvx512Bf16 = {"avx512bf16", quantize,    prepare,      matmul,
                                 scratchBytes, readStreams, peakIntegers, &kAvx512VnniStep};

}  // namespace earnest
