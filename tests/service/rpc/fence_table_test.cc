#include "service/rpc/fence_table.h"

#include <gtest/gtest.h>

namespace keepset::service {
namespace {

TEST(FenceTable, OlderGenerationIsAborted) {
  FenceTable fences(8);
  EXPECT_TRUE(fences.Check("s", "r", 2).ok());
  EXPECT_TRUE(fences.Check("s", "r", 2).ok());
  EXPECT_EQ(fences.Check("s", "r", 1).code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(fences.Check("s", "r", 3).ok());
  EXPECT_EQ(fences.Check("s", "r", 2).code(), absl::StatusCode::kAborted);
}

TEST(FenceTable, SessionsDoNotShareFences) {
  FenceTable fences(8);
  EXPECT_TRUE(fences.Check("a", "r", 9).ok());
  EXPECT_TRUE(fences.Check("b", "r", 1).ok());
}

TEST(FenceTable, WithoutSessionOrRequestIdThereIsNoFence) {
  FenceTable fences(8);
  EXPECT_TRUE(fences.Check("", "r", 9).ok());
  EXPECT_TRUE(fences.Check("", "r", 1).ok());
  EXPECT_TRUE(fences.Check("s", "", 9).ok());
  EXPECT_TRUE(fences.Check("s", "", 1).ok());
}

TEST(FenceTable, LeastRecentlyUsedRequestIsForgotten) {
  FenceTable fences(2);
  EXPECT_TRUE(fences.Check("s", "old", 9).ok());
  EXPECT_TRUE(fences.Check("s", "used", 9).ok());
  EXPECT_TRUE(fences.Check("s", "old", 9).ok());
  EXPECT_TRUE(fences.Check("s", "new", 9).ok());
  EXPECT_EQ(fences.Check("s", "old", 1).code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(fences.Check("s", "used", 1).ok());
}

TEST(FenceTable, EndedSessionIsForgotten) {
  FenceTable fences(8);
  EXPECT_TRUE(fences.Check("s", "r", 9).ok());
  fences.Forget("s");
  EXPECT_TRUE(fences.Check("s", "r", 1).ok());
}

}  // namespace
}  // namespace keepset::service
