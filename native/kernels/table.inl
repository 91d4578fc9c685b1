// The kernel table of a tier. The tier's file includes its traits and kernels first.
#pragma once

#include "kernels/activations.inl"
#include "kernels/attention.inl"
#include "kernels/probes.inl"

// The step kernels have a name of their own, for tiers that take them over.
#define EARNEST_TABLE(variable, name, peak)                                                  \
  namespace earnest {                                                                        \
  extern const KernelTable variable;                                                         \
  extern const StepKernels variable##Step;                                                   \
  const StepKernels variable##Step = stepKernels;                                            \
  const KernelTable variable = {name,        quantize, prepare,    matmul, scratchBytes,     \
                                readStreams, peak,     &variable##Step};                     \
  }
