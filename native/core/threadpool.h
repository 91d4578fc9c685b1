// The threads of one engine. One `run` per step: every worker stays inside it and meets the others
// at barriers, which cost a microsecond or two, where starting and joining costs several.
//
// The caller is worker 0, so a pool of one has no thread at all. Waiting spins for some
// microseconds and then sleeps in the kernel: nothing spins while idle. Two pools may live in one
// process; after a fork the child's first `run` starts threads of its own.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

namespace earnest {

class ThreadPool {
 public:
  // `workers` >= 1, the caller included.
  explicit ThreadPool(int workers);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int workers() const { return workers_; }

  // Work of worker `ith` of `nth`. It must not throw.
  using Work = void (*)(void* context, int ith, int nth);

  // Runs `work` on every worker and returns when all have finished. Calls from several threads
  // take turns. Must not be called from inside `work`.
  void run(Work work, void* context);

  template <class Body>
  void run(Body& body) {
    run([](void* context, int ith, int nth) { (*static_cast<Body*>(context))(ith, nth); }, &body);
  }

  // Inside `work` only: waits until every worker of this run has arrived, and makes what each
  // wrote before visible to all.
  void barrier();

 private:
  struct Threads;
  void start();
  void loop(int ith, uint32_t seen);

  const int workers_;
  std::mutex turn_;
  std::unique_ptr<Threads> threads_;
  int64_t owner_;  // process that started the threads

  Work work_ = nullptr;
  void* context_ = nullptr;
  // Each on a cache line of its own: workers hammer them.
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<bool> stopping_{false};
};

// Threads that this process may use at once: the smallest of the online processors, the affinity
// mask and the cgroup's CPU quota (rounded up). At least 1.
int usableThreads();

}  // namespace earnest
