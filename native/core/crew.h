// How many workers a run is given.
//
// Where other processes hold processors, a worker that waits for one holds up all others at the
// next barrier, and two workers can be slower than one. What workers lost in that way is measured
// in every run; a pool that loses more than a worker is worth goes on with fewer, and tries all of
// them again after a while, at growing intervals as long as that fails.
#pragma once

#include <algorithm>
#include <cstdint>

namespace earnest {

class Crew {
 public:
  explicit Crew(int most) : most_(most), size_(most) {}

  // Of a run that begins at `now`, in nanoseconds of any steady clock.
  int size(int64_t now) {
    if (size_ < most_ && now >= retry_at_) {
      size_ = most_;
      wall_ = lost_ = 0;
      on_trial_ = true;
    }
    return size_;
  }

  // A run of `size()` workers took `wall` and ended at `now`; `lost` is the sum of the times that
  // workers could have run but had no processor.
  void ran(int64_t now, int64_t wall, int64_t lost) {
    wall_ += wall;
    lost_ += std::min(lost, wall);
    // Without one of n workers a run takes at most n / (n - 1) as long as without the loss.
    if (size_ > 1 && lost_ * size_ > std::max(wall_, kWindow)) {
      patience_ = on_trial_ ? std::min(2 * patience_, kLongest) : kShortest;
      // The busier the machine, the longer a trial takes: it may cost a thirtieth of the time.
      const int64_t rest = on_trial_ ? std::min(32 * wall_, kLongestRest) : 0;
      const int64_t fewer = (lost_ + wall_ / 2) / wall_;
      size_ = static_cast<int>(std::max<int64_t>(1, size_ - std::max<int64_t>(1, fewer)));
      retry_at_ = now + std::max(patience_, rest);
    } else if (wall_ < kWindow) {
      return;
    } else if (size_ == most_) {
      on_trial_ = false;
    }
    wall_ = lost_ = 0;
  }

 private:
  static constexpr int64_t kMillisecond = 1'000'000;
  // Several time slices of a scheduler.
  static constexpr int64_t kWindow = 20 * kMillisecond;
  static constexpr int64_t kShortest = 100 * kMillisecond, kLongest = 1600 * kMillisecond,
                           kLongestRest = 10'000 * kMillisecond;

  int most_, size_;
  int64_t wall_ = 0, lost_ = 0;  // since the last decision
  int64_t patience_ = kShortest, retry_at_ = 0;
  bool on_trial_ = false;
};

}  // namespace earnest
