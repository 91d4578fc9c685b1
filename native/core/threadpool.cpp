#include "core/threadpool.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/resource.h>
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

// `generation_` holds the number of workers in these bits, and the number of the run above them.
constexpr uint32_t kCrewBits = 11;
static_assert(ThreadPool::kMostWorkers < 1 << kCrewBits);

// A thread that takes longer to run after it was woken waited for a processor.
constexpr int64_t kUsualWake = 250'000;

int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// What the system says of the calling thread. Where it says nothing, no loss is ever seen.
struct Usage {
  int64_t processor = 0;  // nanoseconds on one
  int64_t preempted = 0;  // how often it was taken away
  int64_t disk = 0;       // pages waited for

  static Usage now() {
    Usage u;
#if defined(__linux__)
    rusage r;
    if (getrusage(RUSAGE_THREAD, &r) == 0) {
      const auto of = [](const timeval& t) { return t.tv_sec * 1'000'000'000LL + t.tv_usec * 1000; };
      u = {of(r.ru_utime) + of(r.ru_stime), r.ru_nivcsw, r.ru_majflt};
    }
#endif
    return u;
  }
};

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // `yield` returns at once on most cores
#endif
}

// Until `value` is no longer `seen`; returns the new one. `asleep` becomes the time at which it
// stopped spinning, or 0.
uint32_t awaitChange(std::atomic<uint32_t>& value, uint32_t seen, int spins, int64_t* asleep) {
  *asleep = 0;
  for (int i = 0; i < spins; ++i) {
    const uint32_t now = value.load(std::memory_order_acquire);
    if (now != seen) return now;
    relax();
  }
  *asleep = nanoseconds();
  uint32_t now;
  while ((now = value.load(std::memory_order_acquire)) == seen)
    value.wait(seen, std::memory_order_acquire);
  return now;
}

// Wakes who waits for `value` to change, after it was changed. libstdc++ asks the system only if it
// sees somebody waiting, by a load that may pass the store of the new value: a waiter that came just
// then would see the old value, be seen by nobody, and sleep for ever. The fence keeps the order.
void announce(std::atomic<uint32_t>& value) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  value.notify_all();
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

thread_local ThreadPool::Tally* ThreadPool::tally_ = nullptr;

ThreadPool::ThreadPool(int workers, bool adaptive)
    : workers_(std::min(std::max(workers, 1), kMostWorkers)), adaptive_(adaptive && workers_ > 1),
      crew_(workers_), tallies_(std::make_unique<Tally[]>(workers_)) {
  start();
}

void ThreadPool::start() {
  threads_ = std::make_unique<Threads>();
  const uint32_t seen = generation_.load(std::memory_order_relaxed);
  try {
    for (int i = 1; i < workers_; ++i)
      threads_->all.emplace_back([this, i, seen] { loop(i, seen); });
  } catch (const std::system_error& error) {
    const size_t had = threads_->all.size() + 1;
    stop();
    throw std::runtime_error("the system gives no more than " + std::to_string(had) +
                             " threads: " + error.what());
  }
  owner_ = processId();
}

void ThreadPool::stop() {
  stopping_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1u << kCrewBits, std::memory_order_release);
  announce(generation_);
  for (std::thread& thread : threads_->all) thread.join();
  threads_.reset();
  stopping_.store(false, std::memory_order_relaxed);
}

ThreadPool::~ThreadPool() {
  if (owner_ == processId())
    stop();
  else
    (void)threads_.release();  // the threads were left behind in the parent
}

void ThreadPool::loop(int ith, uint32_t seen) {
  const FlushDenormals flush;
  int spins = kSpins;
  for (;;) {
    int64_t asleep;
    seen = awaitChange(generation_, seen, spins, &asleep);
    if (stopping_.load(std::memory_order_relaxed)) return;
    const int nth = static_cast<int>(seen & ((1u << kCrewBits) - 1));
    // From here on the run waits for this worker, or is none of its business.
    spins = ith < nth ? kSpins : 0;
    if (ith < nth) work(ith, nth);
  }
}

// The part of worker `ith` in a run.
void ThreadPool::work(int ith, int nth) {
  if (!measured_) {
    work_(context_, ith, nth);
    barrier();
    return;
  }
  Tally& tally = tallies_[ith];
  const int64_t begun = nanoseconds(), late = begun - opened_;
  tally = {0, late > kUsualWake ? late : 0, 0};
  tally_ = &tally;
  const Usage before = Usage::now();
  work_(context_, ith, nth);
  const Usage after = Usage::now();
  tally_ = nullptr;
  const int64_t away =
      nanoseconds() - begun - tally.slept - (after.processor - before.processor);
  tally.lost = tally.late;
  if (after.preempted > before.preempted && after.disk == before.disk && away > 0)
    tally.lost += away;
  barrier();
}

void ThreadPool::runWork(Work work, void* context, bool measured) {
  const std::lock_guard<ForkMutex> mine(turn_);
  if (owner_ != processId()) {
    (void)threads_.release();
    arrived_.store(0, std::memory_order_relaxed);
    start();
  }
  const FlushDenormals flush;
  const int64_t begun = measured ? nanoseconds() : 0;
  const int nth = measured ? crew_.size(begun) : workers_;
  work_ = work;
  context_ = context;
  measured_ = measured && nth > 1;
  opened_ = begun;
  active_.store(nth, std::memory_order_relaxed);
  if (nth > 1) {
    const uint32_t run = (generation_.load(std::memory_order_relaxed) >> kCrewBits) + 1;
    generation_.store(run << kCrewBits | static_cast<uint32_t>(nth), std::memory_order_release);
    announce(generation_);
  }
  this->work(0, nth);
  if (!measured_) return;
  int64_t lost = 0;
  for (int i = 0; i < nth; ++i) lost += tallies_[i].lost;
  const int64_t ended = nanoseconds();
  crew_.ran(ended, ended - begun, lost);
}

void ThreadPool::report(std::atomic<uint32_t>& done, uint32_t parts) {
  done.fetch_add(parts, std::memory_order_release);
  announce(done);
}

void ThreadPool::await(std::atomic<uint32_t>& done, uint32_t parts) {
  uint32_t now = done.load(std::memory_order_acquire);
  while (now < parts) {
    int64_t asleep;
    now = awaitChange(done, now, kSpins, &asleep);
    if (asleep != 0 && tally_ != nullptr) tally_->slept += nanoseconds() - asleep;
  }
}

void ThreadPool::barrier() {
  const int nth = active_.load(std::memory_order_relaxed);
  if (nth == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == nth - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    if (measured_) opened_ = nanoseconds();
    phase_.fetch_add(1, std::memory_order_release);
    announce(phase_);
    return;
  }
  int64_t asleep;
  awaitChange(phase_, phase, kSpins, &asleep);
  if (asleep == 0 || tally_ == nullptr) return;
  const int64_t now = nanoseconds();
  tally_->slept += now - asleep;
  if (now - opened_ > kUsualWake) tally_->late += now - opened_;
}

}  // namespace earnest
