#include "clients/cli/exit_status.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace keepset::cli {
namespace {

TEST(ExitStatus, OkIsDone) { EXPECT_EQ(ExitCodeOf(absl::OkStatus()), ExitCode::kDone); }

TEST(ExitStatus, BadValuesAndUnfitTablesAreRefused) {
  EXPECT_EQ(ExitCodeOf(absl::InvalidArgumentError("budget_tokens=0")), ExitCode::kRefused);
  EXPECT_EQ(ExitCodeOf(absl::FailedPreconditionError("table does not fit")), ExitCode::kRefused);
  EXPECT_EQ(ExitCodeOf(absl::NotFoundError("no table")), ExitCode::kRefused);
}

TEST(ExitStatus, UnknownNamesAreUsage) {
  EXPECT_EQ(ExitCodeOf(absl::InvalidArgumentError("policy tova: unknown parameter a=1")),
            ExitCode::kUsage);
  EXPECT_EQ(ExitCodeOf(absl::NotFoundError("unknown policy 'x'")), ExitCode::kUsage);
}

TEST(ExitStatus, UnavailableIsUnreachable) {
  EXPECT_EQ(ExitCodeOf(absl::UnavailableError("draining")), ExitCode::kUnreachable);
}

TEST(ExitStatus, DeadlineInternalAndQueueAreFailures) {
  EXPECT_EQ(ExitCodeOf(absl::DeadlineExceededError("")), ExitCode::kFailed);
  EXPECT_EQ(ExitCodeOf(absl::InternalError("")), ExitCode::kFailed);
  EXPECT_EQ(ExitCodeOf(absl::ResourceExhaustedError("")), ExitCode::kFailed);
}

TEST(ExitStatus, FixedCodeWinsAndSurvivesAPrefix) {
  const absl::Status status =
      WithPrefix("result", WithExitCode(absl::InvalidArgumentError("x"), ExitCode::kFailed));
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kFailed);
  EXPECT_EQ(status.message(), "result: x");
}

}  // namespace
}  // namespace keepset::cli
