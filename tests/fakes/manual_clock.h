// A clock that stands still until a test moves it.
#ifndef KEEPSET_TESTS_FAKES_MANUAL_CLOCK_H_
#define KEEPSET_TESTS_FAKES_MANUAL_CLOCK_H_

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "base/clock.h"

namespace keepset::fakes {

// Thread-safe. Both times start at their epoch.
class ManualClock final : public Clock {
 public:
  absl::Time Now() const override { return absl::UnixEpoch() + Monotonic(); }
  absl::Duration Monotonic() const override {
    absl::MutexLock lock(&mutex_);
    return elapsed_;
  }
  void Advance(absl::Duration duration) {
    absl::MutexLock lock(&mutex_);
    elapsed_ += duration;
  }

 private:
  mutable absl::Mutex mutex_;
  absl::Duration elapsed_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::fakes

#endif  // KEEPSET_TESTS_FAKES_MANUAL_CLOCK_H_
