// Time as a dependency: rooms receive a Clock, tests pass a fake one.
#ifndef KEEPSET_BASE_CLOCK_H_
#define KEEPSET_BASE_CLOCK_H_

#include "absl/time/time.h"

namespace keepset {

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;

  // Wall time: log lines, "last success" gauges.
  virtual absl::Time Now() const = 0;

  // Monotonic time since an arbitrary origin: leases, durations, deadlines.
  virtual absl::Duration Monotonic() const = 0;
};

// The process-wide system clock; stateless, never destroyed.
const Clock& SystemClock();

}  // namespace keepset

#endif  // KEEPSET_BASE_CLOCK_H_
