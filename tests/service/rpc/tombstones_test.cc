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

TEST(Tombstones, AnIdMayEndMoreOftenThanItsCapacity) {
  Tombstones tombstones(2);
  for (int use = 0; use < 5; ++use) {
    tombstones.Add(7);
    EXPECT_TRUE(tombstones.Contains(7)) << "use " << use;
    tombstones.Remove(7);
  }
}

TEST(Tombstones, OneThatIsNewAgainIsNotTheOldest) {
  Tombstones tombstones(2);
  tombstones.Add(1);
  tombstones.Add(2);
  tombstones.Remove(1);
  tombstones.Add(1);
  tombstones.Add(3);
  EXPECT_TRUE(tombstones.Contains(1));
  EXPECT_FALSE(tombstones.Contains(2));
}

}  // namespace
}  // namespace keepset::service
