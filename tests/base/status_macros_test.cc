#include "base/status_macros.h"

#include <memory>

#include "gtest/gtest.h"

namespace keepset {
namespace {

absl::StatusOr<std::unique_ptr<int>> Make(bool ok) {
  if (!ok) return absl::NotFoundError("nothing");
  return std::make_unique<int>(7);
}

absl::StatusOr<int> Use(bool ok) {
  KEEPSET_ASSIGN_OR_RETURN(std::unique_ptr<int> value, Make(ok));
  return *value;
}

absl::Status Check(bool ok) {
  KEEPSET_RETURN_IF_ERROR(Make(ok).status());
  return absl::OkStatus();
}

TEST(StatusMacros, AssignMovesTheValue) { EXPECT_EQ(*Use(true), 7); }

TEST(StatusMacros, AssignReturnsTheError) {
  EXPECT_EQ(Use(false).status(), absl::NotFoundError("nothing"));
}

TEST(StatusMacros, ReturnIfErrorPassesOk) {
  EXPECT_TRUE(Check(true).ok());
  EXPECT_EQ(Check(false), absl::NotFoundError("nothing"));
}

}  // namespace
}  // namespace keepset
