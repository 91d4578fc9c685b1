#include "core/threadpool.h"

#include <thread>
#include <vector>

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace earnest {

struct ThreadPool::Threads {
  std::vector<std::thread> all;
};

namespace {

// About 20 microseconds: longer than the skew between workers of one phase, much shorter than a
// scheduler's time slice, so a pool with more workers than cores still moves on.
constexpr int kSpins = 2000;

int64_t processId() {
#if defined(_WIN32)
  return _getpid();
#else
  return getpid();
#endif
}

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // `yield` returns at once on most cores
#endif
}

// Until `value` is no longer `seen`; returns the new one.
uint32_t awaitChange(std::atomic<uint32_t>& value, uint32_t seen) {
  for (int i = 0; i < kSpins; ++i) {
    const uint32_t now = value.load(std::memory_order_acquire);
    if (now != seen) return now;
    relax();
  }
  uint32_t now;
  while ((now = value.load(std::memory_order_acquire)) == seen)
    value.wait(seen, std::memory_order_acquire);
  return now;
}

// Kernels treat denormal floats as zero: tiles do so in hardware, and elsewhere they are a hundred
// times slower than others. Only inside a run: the rest of the process keeps its own setting.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(saved_ | uint64_t{1} << 24));
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#else
  FlushDenormals() {}
#endif
};

}  // namespace

ThreadPool::ThreadPool(int workers) : workers_(workers < 1 ? 1 : workers) { start(); }

void ThreadPool::start() {
  threads_ = std::make_unique<Threads>();
  owner_ = processId();
  const uint32_t seen = generation_.load(std::memory_order_relaxed);
  for (int i = 1; i < workers_; ++i)
    threads_->all.emplace_back([this, i, seen] { loop(i, seen); });
}

ThreadPool::~ThreadPool() {
  if (owner_ != processId()) {  // the threads were left behind in the parent
    (void)threads_.release();
    return;
  }
  stopping_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& thread : threads_->all) thread.join();
}

void ThreadPool::loop(int ith, uint32_t seen) {
  const FlushDenormals flush;
  for (;;) {
    seen = awaitChange(generation_, seen);
    if (stopping_.load(std::memory_order_relaxed)) return;
    work_(context_, ith, workers_);
    barrier();
  }
}

void ThreadPool::run(Work work, void* context) {
  const std::lock_guard<std::mutex> mine(turn_);
  if (owner_ != processId()) {
    (void)threads_.release();
    arrived_.store(0, std::memory_order_relaxed);
    start();
  }
  const FlushDenormals flush;
  work_ = work;
  context_ = context;
  if (workers_ > 1) {
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  }
  work(context, 0, workers_);
  barrier();
}

void ThreadPool::barrier() {
  if (workers_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == workers_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  } else {
    awaitChange(phase_, phase);
  }
}

}  // namespace earnest
