#include "isa/isa.h"

#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#define EARNEST_X86 1
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#define EARNEST_ARM 1
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace earnest {

extern const KernelTable kGeneric;
#if EARNEST_X86
extern const KernelTable kAvx2, kAvxVnni, kAvx512Vnni, kAvx512Bf16, kAmx;
#elif EARNEST_ARM
extern const KernelTable kNeonDotprod, kI8mm;
#endif

namespace {

#if EARNEST_X86

// XCR0 says which registers the operating system saves; without its bits a CPUID flag is a trap.
uint64_t enabledState() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// Linux hands out AMX tile state only on request (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA = 18).
bool tilesPermitted() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Features {
  bool avx2 = false, avxvnni = false, avx512vnni = false, avx512bf16 = false, amx = false;
};

Features detect() {
  Features have;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return have;
  const uint32_t leaf1c = c;
  constexpr uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  if ((leaf1c & (kFma | kOsxsave | kAvx | kF16c)) != (kFma | kOsxsave | kAvx | kF16c)) return have;
  const uint64_t state = enabledState();
  if ((state & 0x6) != 0x6) return have;  // SSE and AVX registers
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return have;
  const uint32_t b7 = b, c7 = c, d7 = d;
  have.avx2 = b7 >> 5 & 1;
  uint32_t a71 = 0;
  if (a >= 1 && __get_cpuid_count(7, 1, &a71, &b, &c, &d)) have.avxvnni = have.avx2 && a71 >> 4 & 1;
  const bool f = b7 >> 16 & 1, dq = b7 >> 17 & 1, bw = b7 >> 30 & 1, vl = b7 >> 31 & 1;
  const bool vnni = c7 >> 11 & 1;
  // opmask, upper halves of ZMM0-15, ZMM16-31 besides the above
  have.avx512vnni = have.avx2 && f && dq && bw && vl && vnni && (state & 0xe6) == 0xe6;
  have.avx512bf16 = have.avx512vnni && a71 >> 5 & 1;
  const bool bf16 = d7 >> 22 & 1, tile = d7 >> 24 & 1, int8 = d7 >> 25 & 1;
  have.amx = have.avx512bf16 && bf16 && tile && int8 && (state & 0x60000) == 0x60000 &&
             tilesPermitted();
  return have;
}

#elif EARNEST_ARM

struct Features {
  bool dotprod = false, i8mm = false;
};

#if defined(__APPLE__)
bool flag(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

Features detect() {
  Features have;
#if defined(__linux__)
  have.dotprod = getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
  have.i8mm = have.dotprod && (getauxval(AT_HWCAP2) >> 13 & 1);  // HWCAP2_I8MM
#elif defined(__APPLE__)
  have.dotprod = flag("hw.optional.arm.FEAT_DotProd");
  have.i8mm = have.dotprod && flag("hw.optional.arm.FEAT_I8MM");
#endif
  return have;
}

#endif

struct Tier {
  const KernelTable* table;
  bool usable;
};

// Of this build, lowest first. Test builds leave some out (CMakeLists.txt, EARNEST_TIERS).
std::vector<Tier> tiers() {
#if EARNEST_X86 || EARNEST_ARM
  [[maybe_unused]] const Features have = detect();
#endif
  return {
      {&kGeneric, true},
#if EARNEST_X86 && !EARNEST_WITHOUT_avx2
      {&kAvx2, have.avx2},
#endif
#if EARNEST_X86 && !EARNEST_WITHOUT_avxvnni
      {&kAvxVnni, have.avxvnni},
#endif
#if EARNEST_X86 && !EARNEST_WITHOUT_avx512vnni
      {&kAvx512Vnni, have.avx512vnni},
#endif
#if EARNEST_X86 && !EARNEST_WITHOUT_avx512bf16
      {&kAvx512Bf16, have.avx512bf16},
#endif
#if EARNEST_X86 && !EARNEST_WITHOUT_amx
      {&kAmx, have.amx},
#endif
#if EARNEST_ARM && !EARNEST_WITHOUT_neon_dotprod
      {&kNeonDotprod, have.dotprod},
#endif
#if EARNEST_ARM && !EARNEST_WITHOUT_i8mm
      {&kI8mm, have.i8mm},
#endif
  };
}

}  // namespace

const std::vector<const KernelTable*>& compiledTiers() {
  static const std::vector<const KernelTable*> all = [] {
    std::vector<const KernelTable*> tables;
    for (const Tier& tier : tiers()) tables.push_back(tier.table);
    return tables;
  }();
  return all;
}

const std::vector<const KernelTable*>& availableTiers() {
  static const std::vector<const KernelTable*> usable = [] {
    std::vector<const KernelTable*> tables;
    for (const Tier& tier : tiers())
      if (tier.usable) tables.push_back(tier.table);
    return tables;
  }();
  return usable;
}

const KernelTable* findTier(const char* name) {
  for (const KernelTable* tier : availableTiers())
    if (std::strcmp(tier->name, name) == 0) return tier;
  return nullptr;
}

}  // namespace earnest
