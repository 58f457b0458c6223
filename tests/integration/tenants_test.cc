// Two workers at one server do not meet, whatever names they choose.
#include <gtest/gtest.h>

#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

constexpr uint64_t kBudget = 24;

TEST(Tenants, SameNamesAreDifferentMemory) {
  TestServer server;
  const fakes::SyntheticPrompt first({.seed = 1});
  const fakes::SyntheticPrompt second({.seed = 2});
  WorkerSession a(server);
  WorkerSession b(server);
  WorkerSession::Region of_a = a.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  WorkerSession::Region of_b = b.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  EXPECT_NE(of_a.id, of_b.id);
  const v1::CompressRequest inline_a = WireRequest(first, "snapkv", kBudget);
  const v1::CompressRequest inline_b = WireRequest(second, "snapkv", kBudget);
  const v1::CompressRequest shared_a = ToRegion(inline_a, a.id(), of_a);
  const v1::CompressRequest shared_b = ToRegion(inline_b, b.id(), of_b);
  v1::OperationResult want_a;
  v1::OperationResult want_b;
  v1::OperationResult got_a;
  v1::OperationResult got_b;
  ASSERT_TRUE(Compress(server, inline_a, &want_a).ok());
  ASSERT_TRUE(Compress(server, inline_b, &want_b).ok());
  ASSERT_TRUE(Compress(server, shared_a, &got_a).ok());
  ASSERT_TRUE(Compress(server, shared_b, &got_b).ok());
  EXPECT_EQ(got_a.layers(0).sets(0).indices(), want_a.layers(0).sets(0).indices());
  EXPECT_EQ(got_b.layers(0).sets(0).indices(), want_b.layers(0).sets(0).indices());
  EXPECT_NE(got_a.layers(0).sets(0).indices(), got_b.layers(0).sets(0).indices());
}

TEST(Tenants, RetiringANameLeavesTheOthersAlone) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession a(server);
  WorkerSession b(server);
  WorkerSession::Region of_a = a.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  WorkerSession::Region of_b = b.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  ASSERT_TRUE(a.Retire(of_a.id, 1000).ok());
  EXPECT_EQ(a.List().regions_size(), 0);
  EXPECT_EQ(b.List().regions_size(), 1);
  EXPECT_TRUE(
      Compress(server, ToRegion(WireRequest(prompt, "snapkv", kBudget), b.id(), of_b), nullptr)
          .ok());
}

}  // namespace
}  // namespace keepset::integration
