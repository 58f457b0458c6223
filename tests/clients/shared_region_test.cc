#include "clients/cpp/shared_region.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdint>
#include <limits>

#include "gtest/gtest.h"

namespace keepset::client {
namespace {

TEST(SharedRegion, IsSealedAgainstShrinking) {
  const auto region = SharedRegion::Create("test", 100);
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_NE(fcntl((*region)->fd(), F_GET_SEALS) & F_SEAL_SHRINK, 0);
  EXPECT_NE(ftruncate((*region)->fd(), 0), 0);
}

TEST(SharedRegion, RoundsUpToPages) {
  const auto region = SharedRegion::Create("test", 1);
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ((*region)->size_bytes() % sysconf(_SC_PAGESIZE), 0);
}

TEST(SharedRegion, RefusesSizesThatAreNone) {
  EXPECT_EQ(SharedRegion::Create("test", 0).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(SharedRegion::Create("test", -1).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(SharedRegion::Create("test", std::numeric_limits<int64_t>::max()).ok());
}

TEST(SharedRegion, AllocationsAreAlignedAndDisjoint) {
  const auto region = SharedRegion::Create("test", 4096);
  ASSERT_TRUE(region.ok()) << region.status();
  const auto a = (*region)->Allocate(3);
  const auto b = (*region)->Allocate(3);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_EQ(reinterpret_cast<uintptr_t>(*b) % 64, 0);
  EXPECT_GE(*b - *a, 3);
}

TEST(SharedRegion, RefusesWhatDoesNotFit) {
  const auto region = SharedRegion::Create("test", 4096);
  ASSERT_TRUE(region.ok()) << region.status();
  const int64_t size = (*region)->size_bytes();
  EXPECT_FALSE((*region)->Allocate(size + 1).ok());
  ASSERT_TRUE((*region)->Allocate(size).ok());
  EXPECT_EQ((*region)->Allocate(1).status().code(), absl::StatusCode::kResourceExhausted);
  (*region)->Reset();
  EXPECT_TRUE((*region)->Allocate(size).ok());
}

TEST(SharedRegion, ContainsNeitherItsEndNorBeyond) {
  const auto region = SharedRegion::Create("test", 4096);
  ASSERT_TRUE(region.ok()) << region.status();
  const int64_t size = (*region)->size_bytes();
  EXPECT_TRUE((*region)->Contains((*region)->data(), size));
  EXPECT_FALSE((*region)->Contains((*region)->data() + 1, size));
  EXPECT_FALSE((*region)->Contains((*region)->data(), std::numeric_limits<int64_t>::max()));
  EXPECT_FALSE((*region)->Contains((*region)->data() + size, 1));
  EXPECT_FALSE((*region)->Contains(&size, 1));
}

}  // namespace
}  // namespace keepset::client
