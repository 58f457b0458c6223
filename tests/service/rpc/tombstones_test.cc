#include "service/rpc/tombstones.h"

#include <gtest/gtest.h>

namespace keepset::service {
namespace {

TEST(Tombstones, RemembersUntilRemoved) {
  Tombstones tombstones(4);
  tombstones.Add(1);
  EXPECT_TRUE(tombstones.Contains(1));
  tombstones.Remove(1);
  EXPECT_FALSE(tombstones.Contains(1));
}

TEST(Tombstones, ForgetsTheOldestBeyondItsCapacity) {
  Tombstones tombstones(2);
  for (uint64_t id : {1, 2, 3}) tombstones.Add(id);
  EXPECT_FALSE(tombstones.Contains(1));
  EXPECT_TRUE(tombstones.Contains(2));
  EXPECT_TRUE(tombstones.Contains(3));
}

}  // namespace
}  // namespace keepset::service
