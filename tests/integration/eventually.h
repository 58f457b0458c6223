// Waiting for what another thread or process will do.
#ifndef KEEPSET_TESTS_INTEGRATION_EVENTUALLY_H_
#define KEEPSET_TESTS_INTEGRATION_EVENTUALLY_H_

#include <functional>
#include <thread>

#include "absl/time/time.h"
#include "base/clock.h"

namespace keepset::integration {

// Long: only a failing test waits so long.
inline constexpr absl::Duration kTestDeadline = absl::Seconds(30);

// Polls until `condition` holds; false after kTestDeadline.
inline bool Eventually(const std::function<bool()>& condition) {
  const absl::Duration end = SystemClock().Monotonic() + kTestDeadline;
  while (!condition()) {
    if (SystemClock().Monotonic() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

}  // namespace keepset::integration

#endif  // KEEPSET_TESTS_INTEGRATION_EVENTUALLY_H_
