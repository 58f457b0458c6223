// Regions of a session: names, descriptors, leases and retirement.
#include <cstdint>
#include <string>
#include <thread>
#include <utility>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/memory/session_manager.h"
#include "tests/service/memory/memory_test_support.h"
#include "tests/service/memory/session_manager_fixture.h"

namespace keepset::service {
namespace {

using testing::IsMapped;
using testing::NewMemfd;
using testing::PageBytes;
using testing::SessionManagerTest;
using testing::Whole;

TEST_F(SessionManagerTest, LeaseShowsTheClientsBytes) {
  const SessionInfo session = Open('a');
  const RegionLease lease = MustLease(session.session_id, MustRegister(session.session_id, "kv"));
  EXPECT_EQ(lease.region().data()[250], std::byte{250});
}

TEST_F(SessionManagerTest, RegionOfAnotherSessionIsNotFound) {
  const SessionInfo mine = Open('a');
  const SessionInfo other = Open('b');
  const std::string region_id = MustRegister(other.session_id, "kv");
  EXPECT_EQ(sessions_->Lease(mine.session_id, region_id).status(),
            sessions_->Lease(mine.session_id, "no-such-region").status());
  EXPECT_EQ(sessions_->RetireRegion(mine.session_id, region_id, absl::ZeroDuration()).code(),
            absl::StatusCode::kNotFound);
  EXPECT_TRUE(sessions_->ListRegions(mine.session_id)->empty());
}

TEST_F(SessionManagerTest, TwoSessionsMayUseOneName) {
  const SessionInfo a = Open('a');
  const SessionInfo b = Open('b');
  EXPECT_NE(MustRegister(a.session_id, "kv"), MustRegister(b.session_id, "kv"));
}

TEST_F(SessionManagerTest, OneSessionUsesANameOnce) {
  const SessionInfo session = Open('a');
  MustRegister(session.session_id, "kv");
  EXPECT_EQ(Register(session.session_id, "kv").status().code(), absl::StatusCode::kAlreadyExists);
}

TEST_F(SessionManagerTest, NameIsFreeAfterRetire) {
  const SessionInfo session = Open('a');
  const std::string id = MustRegister(session.session_id, "kv");
  ASSERT_TRUE(sessions_->RetireRegion(session.session_id, id, absl::ZeroDuration()).ok());
  EXPECT_NE(MustRegister(session.session_id, "kv"), id);
}

TEST_F(SessionManagerTest, NameIsFreeAfterAFailedRegistration) {
  const SessionInfo session = Open('a');
  const auto token = sessions_->DepositFd(session.session_id, NewMemfd("k", PageBytes()));
  EXPECT_EQ(sessions_->RegisterRegion(session.session_id, "kv", *token, Whole("memfd", 1))
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
  MustRegister(session.session_id, "kv");
}

TEST_F(SessionManagerTest, RefusesNamesThatAreNotPrintable) {
  const SessionInfo session = Open('a');
  for (const std::string& name :
       {std::string(), std::string("a b"), std::string("a\n"), std::string(129, 'n')}) {
    EXPECT_EQ(Register(session.session_id, name).status().code(),
              absl::StatusCode::kInvalidArgument)
        << name;
  }
}

TEST_F(SessionManagerTest, FdTokenServesOnce) {
  const SessionInfo session = Open('a');
  const auto token = sessions_->DepositFd(session.session_id, NewMemfd("k", PageBytes()));
  const auto use = [&](const std::string& name) {
    return sessions_->RegisterRegion(session.session_id, name, *token, Whole("memfd", PageBytes()))
        .status()
        .code();
  };
  EXPECT_EQ(use("one"), absl::StatusCode::kOk);
  EXPECT_EQ(use("two"), absl::StatusCode::kNotFound);
}

TEST_F(SessionManagerTest, FdTokenOfAnotherSessionIsNotFound) {
  const SessionInfo mine = Open('a');
  const SessionInfo other = Open('b');
  const auto token = sessions_->DepositFd(other.session_id, NewMemfd("k", PageBytes()));
  EXPECT_EQ(sessions_->RegisterRegion(mine.session_id, "kv", *token, Whole("memfd", PageBytes()))
                .status()
                .code(),
            absl::StatusCode::kNotFound);
}

TEST_F(SessionManagerTest, PendingDescriptorsAreBounded) {
  const SessionInfo session = Open('a');
  absl::Status last;
  int taken = 0;
  while ((last = sessions_->DepositFd(session.session_id, NewMemfd("k", 1)).status()).ok() &&
         taken < 1000) {
    ++taken;
  }
  EXPECT_EQ(taken, 64);
  EXPECT_EQ(last.code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(SessionManagerTest, PendingDescriptorsEndWithTheSession) {
  const SessionInfo session = Open('a');
  const int64_t before = testing::CountOpenFds();
  ASSERT_TRUE(sessions_->DepositFd(session.session_id, NewMemfd("k", 1)).ok());
  EXPECT_EQ(testing::CountOpenFds(), before + 1);
  ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
  EXPECT_EQ(testing::CountOpenFds(), before);
}

TEST_F(SessionManagerTest, KindThatIsOffIsNotFound) {
  const SessionInfo session = Open('a');
  RegionDescriptor descriptor = Whole("posix_shm", PageBytes());
  descriptor.name = "/keepset";
  const absl::Status status =
      sessions_->RegisterRegion(session.session_id, "kv", 0, std::move(descriptor)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(status.message(), "kind=\"posix_shm\": not taken here, want one of: memfd");
  EXPECT_THAT(observer_.refused_kinds(), ::testing::ElementsAre("unknown"));
}

TEST_F(SessionManagerTest, KindOfADeviceFitsNoServerInHostMemory) {
  const SessionInfo session = Open('a');
  const absl::Status status =
      sessions_->RegisterRegion(session.session_id, "kv", 0, Whole("cuda_ipc", PageBytes()))
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(),
            "kind=\"cuda_ipc\": this server has no device, want a server with backend \"cuda\", or "
            "memory of one of: memfd");
}

TEST_F(SessionManagerTest, KindThatNobodyKnowsIsEchoedInShort) {
  const SessionInfo session = Open('a');
  const std::string kind = "\n" + std::string(1000, 'x');
  const absl::Status status =
      sessions_->RegisterRegion(session.session_id, "kv", 0, Whole(kind, PageBytes())).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), ::testing::StartsWith("kind=\"\\nxxx"));
  EXPECT_LT(status.message().size(), 100u);
}

TEST_F(SessionManagerTest, MemfdWithoutADescriptorIsInvalid) {
  const SessionInfo session = Open('a');
  EXPECT_EQ(sessions_->RegisterRegion(session.session_id, "kv", 0, Whole("memfd", PageBytes()))
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(SessionManagerTest, RetireUnmaps) {
  const SessionInfo session = Open('a');
  const std::string id = MustRegister(session.session_id, "retire-unmaps");
  ASSERT_TRUE(IsMapped("memfd:keepset-retire-unmaps"));
  ASSERT_TRUE(sessions_->RetireRegion(session.session_id, id, absl::ZeroDuration()).ok());
  EXPECT_FALSE(IsMapped("memfd:keepset-retire-unmaps"));
  EXPECT_EQ(sessions_->Lease(session.session_id, id).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(SessionManagerTest, RetireOfARegionInUseTimesOutAndLeavesItRetiring) {
  const SessionInfo session = Open('a');
  const std::string id = MustRegister(session.session_id, "busy");
  const RegionLease lease = MustLease(session.session_id, id);
  EXPECT_EQ(sessions_->RetireRegion(session.session_id, id, absl::ZeroDuration()).code(),
            absl::StatusCode::kDeadlineExceeded);
  const auto regions = sessions_->ListRegions(session.session_id);
  ASSERT_EQ(regions->size(), 1u);
  EXPECT_TRUE(regions->at(0).retiring);
  EXPECT_EQ(regions->at(0).leases, 1);
  EXPECT_EQ(lease.region().data()[1], std::byte{1});
  EXPECT_EQ(sessions_->Lease(session.session_id, id).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(SessionManagerTest, LastLeaseOfARetiringRegionUnmaps) {
  const SessionInfo session = Open('a');
  const std::string id = MustRegister(session.session_id, "last-lease");
  RegionLease first = MustLease(session.session_id, id);
  RegionLease second = MustLease(session.session_id, id);
  ASSERT_FALSE(sessions_->RetireRegion(session.session_id, id, absl::ZeroDuration()).ok());
  first = RegionLease();
  EXPECT_TRUE(IsMapped("memfd:keepset-last-lease"));
  second = RegionLease();
  EXPECT_FALSE(IsMapped("memfd:keepset-last-lease"));
  EXPECT_TRUE(sessions_->ListRegions(session.session_id)->empty());
  // The client that timed out before learns that it may free the memory.
  EXPECT_TRUE(sessions_->RetireRegion(session.session_id, id, absl::ZeroDuration()).ok());
}

TEST_F(SessionManagerTest, RetireWaitsForTheLease) {
  const SessionInfo session = Open('a');
  const std::string id = MustRegister(session.session_id, "waits");
  RegionLease lease = MustLease(session.session_id, id);
  absl::Status retired;
  std::thread retiring(
      [&] { retired = sessions_->RetireRegion(session.session_id, id, absl::InfiniteDuration()); });
  // Refused leases show that the retire has begun.
  while (sessions_->Lease(session.session_id, id).ok()) std::this_thread::yield();
  EXPECT_TRUE(IsMapped("memfd:keepset-waits"));
  lease = RegionLease();
  retiring.join();
  EXPECT_TRUE(retired.ok()) << retired;
  EXPECT_FALSE(IsMapped("memfd:keepset-waits"));
}

TEST_F(SessionManagerTest, LeaseOutlivesItsSession) {
  const SessionInfo session = Open('a');
  RegionLease lease = MustLease(session.session_id, MustRegister(session.session_id, "outlives"));
  ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
  EXPECT_EQ(lease.region().data()[9], std::byte{9});
  lease = RegionLease();
  EXPECT_FALSE(IsMapped("memfd:keepset-outlives"));
}

TEST_F(SessionManagerTest, LeaseOutlivesTheManager) {
  const SessionInfo session = Open('a');
  const RegionLease lease =
      MustLease(session.session_id, MustRegister(session.session_id, "manager"));
  sessions_.reset();
  EXPECT_EQ(lease.region().data()[9], std::byte{9});
}

}  // namespace
}  // namespace keepset::service
