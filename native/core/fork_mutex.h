// A mutex that a forked child finds open: whoever held it stayed behind in the parent.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <new>

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif

namespace earnest {

inline int64_t processId() {
#if defined(_WIN32)
  return _getpid();
#else
  return getpid();
#endif
}

class ForkMutex {
 public:
  void lock() {
    if (owner_.load(std::memory_order_acquire) != processId()) {
      static std::mutex reborn;
      const std::lock_guard<std::mutex> guard(reborn);
      if (owner_.load(std::memory_order_relaxed) != processId()) {
        new (&mutex_) std::mutex;
        owner_.store(processId(), std::memory_order_release);
      }
    }
    mutex_.lock();
  }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
  std::atomic<int64_t> owner_{processId()};
};

}  // namespace earnest
