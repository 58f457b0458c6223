// Waiting for what another thread or process will do.
#ifndef KEEPSET_TESTS_INTEGRATION_EVENTUALLY_H_
#define KEEPSET_TESTS_INTEGRATION_EVENTUALLY_H_

#include <cstdlib>
#include <functional>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/time/time.h"
#include "base/clock.h"

namespace keepset::integration {

// Long: only a failing test waits so long. KEEPSET_TEST_DEADLINE_SECONDS: another one, for hosts
// where a server takes longer to start (CUDA with many devices).
inline absl::Duration TestDeadline() {
  constexpr int kSeconds = 30;
  const char* const text = std::getenv("KEEPSET_TEST_DEADLINE_SECONDS");
  int seconds = 0;
  const bool is_given = text != nullptr && absl::SimpleAtoi(text, &seconds) && seconds > 0;
  return absl::Seconds(is_given ? seconds : kSeconds);
}

// Polls until `condition` holds; false after TestDeadline().
inline bool Eventually(const std::function<bool()>& condition) {
  const absl::Duration end = SystemClock().Monotonic() + TestDeadline();
  while (!condition()) {
    if (SystemClock().Monotonic() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

}  // namespace keepset::integration

#endif  // KEEPSET_TESTS_INTEGRATION_EVENTUALLY_H_
