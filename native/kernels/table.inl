// The kernel table of a tier. The tier's file includes its traits and kernels first.
#pragma once

#include "kernels/activations.inl"
#include "kernels/attention.inl"
#include "kernels/probes.inl"

#define EARNEST_TABLE(variable, name, peak)                                                  \
  namespace earnest {                                                                        \
  extern const KernelTable variable;                                                         \
  const KernelTable variable = {name,        quantize, prepare,    matmul, scratchBytes,     \
                                readStreams, peak,     &stepKernels};                        \
  }
