// Which instruction-set tiers this build has and this machine can run, best first.
#pragma once

#include <vector>

#include "earnest/kernels.h"

namespace earnest {

// All tiers compiled into this build, lowest first.
const std::vector<const KernelTable*>& compiledTiers();

// Those that this processor and this operating system can run, lowest first; never empty. Asks the
// operating system for permission to use AMX tiles the first time.
const std::vector<const KernelTable*>& availableTiers();

// The tier called `name` if it is available, else null.
const KernelTable* findTier(const char* name);

}  // namespace earnest
