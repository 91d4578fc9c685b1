// The kernel table of a tier; the tier's file names it and sets EARNEST_TIER and its traits.
#pragma once

#include "kernels/activations.inl"
#include "kernels/attention.inl"
#include "kernels/matmul.inl"
#include "kernels/probes.inl"

namespace earnest {
namespace {

size_t scratchBytes(int64_t columns, int64_t tokens) {
  const int64_t blocks = columns / kBlock;
  int64_t bytes = R * blocks * kExpandedBytesMax;
#if EARNEST_AMX
  bytes += tileScratchBytes(columns, tokens);
#endif
  (void)tokens;
  return static_cast<size_t>(bytes + 64);
}

}  // namespace
}  // namespace earnest

#define EARNEST_TABLE(variable, name)                                                       \
  namespace earnest {                                                                       \
  extern const KernelTable variable;                                                        \
  const KernelTable variable = {name,        quantize,     prepare,     matmul, scratchBytes, \
                                readStreams, EARNEST_PEAK, &stepKernels};                   \
  }
