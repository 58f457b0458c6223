// Second opinions of operations: finishes them, at once or beside the reply on a queue of their
// own, and is the one place that counts and logs what came of them. Nothing here reaches the
// deciding operation. Thread-safe.
#ifndef KEEPSET_SERVICE_RPC_SHADOW_RUNNER_H_
#define KEEPSET_SERVICE_RPC_SHADOW_RUNNER_H_

#include <map>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/log.h"
#include "engine/shadow.h"
#include "service/metrics/metrics.h"
#include "service/rpc/work_queue.h"

namespace keepset::service {

class ShadowRunner {
 public:
  // All outlive the runner; `queue` runs nothing but this, so that no operation waits behind it.
  ShadowRunner(WorkQueue& queue, Metrics& metrics, Logger& log, const Clock& clock)
      : queue_(queue), metrics_(metrics), log_(log), clock_(clock) {}

  // Errors are counted already.
  absl::StatusOr<engine::ShadowReport> FinishNow(engine::ShadowDecision& decision);
  // Skipped when too many are waiting.
  void FinishLater(std::unique_ptr<engine::ShadowDecision> decision);

  void RecordSkipped();
  // The log hears of each code once a minute.
  void RecordFailed(const absl::Status& why);

 private:
  WorkQueue& queue_;
  Metrics& metrics_;
  Logger& log_;
  const Clock& clock_;
  absl::Mutex mutex_;
  std::map<absl::StatusCode, absl::Duration> logged_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_SHADOW_RUNNER_H_
