// The threads of one engine. One `run` per step: every worker stays inside it and meets the others
// at barriers, which cost a microsecond or two, where starting and joining costs several.
//
// The caller is worker 0, so a pool of one has no thread at all. Waiting spins for some
// microseconds and then sleeps in the kernel: nothing spins while idle. Two pools may live in one
// process; after a fork the child's first `run` starts threads of its own, even if a run was going
// on in the parent.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "core/crew.h"
#include "core/fork_mutex.h"

namespace earnest {

class ThreadPool {
 public:
  static constexpr int kMostWorkers = 1024;

  // `workers` from 1 to 1024, the caller included. Throws std::runtime_error if the system gives no
  // such number of threads. An adaptive pool leaves workers out of `runCrew` while other processes
  // hold their processors (core/crew.h).
  explicit ThreadPool(int workers, bool adaptive = false);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int workers() const { return workers_; }
  // Workers of the run now going on, or of the last one.
  int active() const { return active_.load(std::memory_order_relaxed); }

  // Work of worker `ith` of `nth`. It must not throw.
  using Work = void (*)(void* context, int ith, int nth);

  // Runs `body(ith, nth)` on every worker and returns when all have finished. Calls from several threads
  // take turns. Must not be called from inside `work`.
  template <class Body>
  void run(Body& body) {
    runWork(&call<Body>, &body, false);
  }
  // The same, but an adaptive pool may take fewer workers: for work that is right with any number.
  template <class Body>
  void runCrew(Body& body) {
    runWork(&call<Body>, &body, adaptive_);
  }

  // Inside `work` only: waits until every worker of this run has arrived, and makes what each
  // wrote before visible to all.
  void barrier();
  // Inside `work` only: adds to `done`, which `await` waits for, and makes what was written before
  // visible to whom that lets go on.
  static void report(std::atomic<uint32_t>& done, uint32_t parts);
  // Inside `work` only: waits until `parts` are done. Workers must be at all of them already.
  static void await(std::atomic<uint32_t>& done, uint32_t parts);

 private:
  struct Threads;
  // What a worker knows of its time in a run, in nanoseconds. On cache lines of its own.
  struct alignas(64) Tally {
    int64_t slept = 0;  // in the kernel, at barriers
    int64_t late = 0;   // between being woken there and running
    int64_t lost = 0;   // ready to run, but without a processor
  };

  template <class Body>
  static void call(void* context, int ith, int nth) {
    (*static_cast<Body*>(context))(ith, nth);
  }
  void start();
  void stop();
  void loop(int ith, uint32_t seen);
  void runWork(Work work, void* context, bool measured);
  void work(int ith, int nth);

  static thread_local Tally* tally_;  // of this thread, inside a measured run

  const int workers_;
  const bool adaptive_;
  ForkMutex turn_;
  std::unique_ptr<Threads> threads_;
  int64_t owner_ = 0;  // process that started the threads
  Crew crew_;
  std::unique_ptr<Tally[]> tallies_;

  // Of the run. Read by its workers only: others may wake late and find the next run's.
  Work work_ = nullptr;
  void* context_ = nullptr;
  bool measured_ = false;
  int64_t opened_ = 0;  // when the run began or its latest barrier opened, if measured
  std::atomic<int32_t> active_{1};
  // Each on a cache line of its own: workers hammer them.
  alignas(64) std::atomic<uint32_t> generation_{0};  // number of the run, then of its workers
  alignas(64) std::atomic<int32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<bool> stopping_{false};
};

// Threads that this process may use at once: the smallest of the online processors, the affinity
// mask and the cgroup's CPU quota (rounded up). At least 1.
int usableThreads();

}  // namespace earnest
