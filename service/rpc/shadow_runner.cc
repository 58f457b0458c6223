#include "service/rpc/shadow_runner.h"

#include <exception>
#include <new>
#include <string>
#include <utility>

#include "base/text.h"

namespace keepset::service {
namespace {

constexpr absl::Duration kLogPause = absl::Minutes(1);
constexpr size_t kMaxLoggedError = 2048;

// What libraries throw ends here: nobody waits for an answer.
absl::StatusOr<engine::ShadowReport> Finish(engine::ShadowDecision& decision) {
  try {
    return decision.Finish();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("no memory for the keep sets of the shadow table");
  } catch (const std::exception& error) {
    return absl::InternalError(error.what());
  }
}

}  // namespace

absl::StatusOr<engine::ShadowReport> ShadowRunner::FinishNow(engine::ShadowDecision& decision) {
  absl::StatusOr<engine::ShadowReport> report = Finish(decision);
  if (!report.ok()) {
    RecordFailed(report.status());
    return report;
  }
  metrics_.RecordShadow({.result = ShadowSample::Result::kScored,
                         .kept_overlap = report->kept_overlap,
                         .decided_bytes = report->decided_bytes,
                         .would_be_bytes = report->would_be_bytes,
                         .time = report->time});
  return report;
}

void ShadowRunner::FinishLater(std::unique_ptr<engine::ShadowDecision> decision) {
  const absl::Status queued = queue_.Submit(
      [this, decision = std::move(decision)] { FinishNow(*decision).status().IgnoreError(); });
  if (!queued.ok()) RecordSkipped();
}

void ShadowRunner::RecordSkipped() {
  ShadowSample sample;
  sample.result = ShadowSample::Result::kSkipped;
  metrics_.RecordShadow(sample);
}

void ShadowRunner::RecordFailed(const absl::Status& why) {
  ShadowSample sample;
  sample.result = ShadowSample::Result::kFailed;
  metrics_.RecordShadow(sample);
  {
    const absl::Duration now = clock_.Monotonic();
    absl::MutexLock lock(&mutex_);
    const auto [last, is_first] = logged_.emplace(why.code(), now);
    if (!is_first && now - last->second < kLogPause) return;
    last->second = now;
  }
  log_.Warning("shadow_failed", {{"code", absl::StatusCodeToString(why.code())},
                                 {"error", ToText(why.message(), kMaxLoggedError)}});
}

}  // namespace keepset::service
