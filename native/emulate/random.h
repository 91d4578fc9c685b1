// Numbers for the checks, the same in every run (xorshift64).
#pragma once

#include <cstdint>

namespace {

uint64_t state = 88172645463325252u;
uint32_t random32() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return static_cast<uint32_t>(state >> 16);
}
// From -1 to 1.
float uniform() { return static_cast<float>(random32() & 0xffffff) / 8388608.0f - 1.0f; }

}  // namespace
