// How many threads this process may use at once.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>

#include "core/threadpool.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace earnest {
namespace {

#if defined(__linux__)

int affinityCount() {
  // Room for 8192 processors; the kernel refuses a mask that is smaller than its own.
  constexpr int kMost = 8192;
  cpu_set_t* set = CPU_ALLOC(kMost);
  if (set == nullptr) return 0;
  const size_t size = CPU_ALLOC_SIZE(kMost);
  const int count = sched_getaffinity(0, size, set) == 0 ? CPU_COUNT_S(size, set) : 0;
  CPU_FREE(set);
  return count;
}

// Processors' worth of time a control group may use, or 0 for no limit.
double quotaOf(const std::string& folder) {
  double quota = 0, period = 0;
  std::string word;
  if (std::ifstream v2(folder + "/cpu.max"); v2 >> word >> period) {
    if (word == "max") return 0;
    quota = std::atof(word.c_str());
  } else {
    std::ifstream v1(folder + "/cpu.cfs_quota_us"), v1p(folder + "/cpu.cfs_period_us");
    if (!(v1 >> quota) || !(v1p >> period)) return 0;
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

// The tightest limit of this process's groups and of their parents.
double cgroupQuota() {
  double least = 0;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string root;
    if (controllers.empty())
      root = "/sys/fs/cgroup";
    else if (("," + controllers + ",").find(",cpu,") != std::string::npos)
      root = "/sys/fs/cgroup/cpu";
    else
      continue;
    std::string path = line.substr(second + 1);
    for (;;) {
      const double quota = quotaOf(root + (path == "/" ? "" : path));
      if (quota > 0 && (least == 0 || quota < least)) least = quota;
      const size_t slash = path.rfind('/');
      if (slash == std::string::npos || path.empty()) break;
      path.resize(slash);
    }
  }
  return least;
}

#endif

}  // namespace

int usableThreads() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  if (const int allowed = affinityCount(); allowed > 0) count = allowed;
  if (const double quota = cgroupQuota(); quota > 0)
    count = std::min(count, static_cast<int>(std::ceil(quota)));
#endif
  return std::max(count, 1);
}

}  // namespace earnest
