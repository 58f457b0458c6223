#include "service/rpc/shadow_runner.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/fake_clock.h"

namespace keepset::service {
namespace {

using ::testing::HasSubstr;

class AnsweringDecision final : public engine::ShadowDecision {
 public:
  explicit AnsweringDecision(absl::StatusOr<engine::ShadowReport> answer)
      : answer_(std::move(answer)) {}
  absl::StatusOr<engine::ShadowReport> Finish() override { return answer_; }

 private:
  const absl::StatusOr<engine::ShadowReport> answer_;
};

class ThrowingDecision final : public engine::ShadowDecision {
 public:
  absl::StatusOr<engine::ShadowReport> Finish() override { throw std::runtime_error("library"); }
};

// Runs nothing until told.
class HeldQueue final : public WorkQueue {
 public:
  absl::Status Submit(const Flow& /*flow*/, Task task) override {
    if (full) return absl::ResourceExhaustedError("full");
    held = std::move(task);
    return absl::OkStatus();
  }
  void Continue(const Flow& /*flow*/, Task /*task*/) override {}
  void Resume(const Flow& /*flow*/, Task /*task*/) override {}
  std::optional<Seat> TakeSeat() override { return std::nullopt; }
  int64_t waiting() const override { return 0; }
  bool Waits(int /*up_to_size_class*/) const override { return false; }
  absl::Duration RetryHint() const override { return absl::ZeroDuration(); }

  bool full = false;
  Task held;

 private:
  void LeaveSeat() override {}
};

class ShadowRunnerTest : public ::testing::Test {
 protected:
  double Count(const std::string& result) {
    return Sample(absl::StrCat("keepset_shadow_operations_total{result=\"", result, "\"} "));
  }
  double Sample(const std::string& series) {
    const std::string page = metrics_->Render();
    const size_t at = page.find("\n" + series);
    return at == std::string::npos ? -1 : std::stod(page.substr(at + 1 + series.size()));
  }
  static engine::ShadowReport Report() {
    engine::ShadowReport report;
    report.kept_overlap = 0.75;
    report.decided_bytes = 100;
    report.would_be_bytes = 80;
    report.time = absl::Milliseconds(2);
    return report;
  }

  std::ostringstream lines_;
  fakes::FakeClock clock_;
  Logger log_{&lines_, LogFormat::kText, clock_};
  std::unique_ptr<Metrics> metrics_ = Metrics::New({"1", "cpu"}, {});
  HeldQueue queue_;
  ShadowRunner runner_{queue_, *metrics_, log_, clock_};
};

TEST_F(ShadowRunnerTest, CountsWhatWasScored) {
  AnsweringDecision decision(Report());
  EXPECT_TRUE(runner_.FinishNow(decision).ok());
  EXPECT_EQ(Count("scored"), 1);
  EXPECT_EQ(Sample("keepset_shadow_kept_overlap_sum "), 0.75);
  EXPECT_EQ(Sample("keepset_shadow_decided_bytes_total "), 100);
  EXPECT_EQ(Sample("keepset_shadow_would_be_bytes_total "), 80);
  EXPECT_EQ(Sample("keepset_shadow_duration_seconds_sum "), 0.002);
}

TEST_F(ShadowRunnerTest, FinishesLaterOnItsQueue) {
  runner_.FinishLater(std::make_unique<AnsweringDecision>(Report()));
  EXPECT_EQ(Count("scored"), 0);
  queue_.held();
  EXPECT_EQ(Count("scored"), 1);
}

TEST_F(ShadowRunnerTest, SkipsWhatTheQueueHasNoRoomFor) {
  queue_.full = true;
  runner_.FinishLater(std::make_unique<AnsweringDecision>(Report()));
  EXPECT_EQ(Count("skipped"), 1);
}

TEST_F(ShadowRunnerTest, CountsWhatWasThrown) {
  ThrowingDecision decision;
  EXPECT_EQ(runner_.FinishNow(decision).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(Count("failed"), 1);
  EXPECT_THAT(lines_.str(), HasSubstr("library"));
}

TEST_F(ShadowRunnerTest, LogsEachCodeOnceAMinute) {
  const auto lines = [this] {
    const std::string text = lines_.str();
    return std::count(text.begin(), text.end(), '\n');
  };
  for (int i = 0; i < 3; ++i) runner_.RecordFailed(absl::NotFoundError("gone"));
  EXPECT_EQ(lines(), 1);
  runner_.RecordFailed(absl::InternalError("broken"));
  EXPECT_EQ(lines(), 2);
  clock_.Advance(absl::Seconds(61));
  runner_.RecordFailed(absl::NotFoundError("gone"));
  EXPECT_EQ(lines(), 3);
  EXPECT_EQ(Count("failed"), 5);
}

}  // namespace
}  // namespace keepset::service
