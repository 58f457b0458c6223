// Sessions: their ids, leases, tokens and ends.
#include "service/memory/session_manager.h"

#include <set>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/service/memory/memory_test_support.h"
#include "tests/service/memory/session_manager_fixture.h"

namespace keepset::service {
namespace {

using testing::ArgsOf;
using testing::IsMapped;
using testing::NewMemfd;
using testing::PageBytes;
using testing::SessionManagerTest;
using testing::Whole;

TEST_F(SessionManagerTest, RefusesAUuidOfOtherLength) {
  OpenSessionArgs args = ArgsOf('a');
  args.client_uuid.pop_back();
  EXPECT_EQ(sessions_->OpenSession(args).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(SessionManagerTest, RefusesANegativeLease) {
  OpenSessionArgs args = ArgsOf('a');
  args.lease = -absl::Seconds(1);
  EXPECT_EQ(sessions_->OpenSession(args).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(SessionManagerTest, GrantsNoLongerLeaseThanTheLimit) {
  OpenSessionArgs args = ArgsOf('a');
  args.lease = absl::Hours(48);
  EXPECT_EQ(sessions_->OpenSession(args)->lease, SessionLimits().max_lease);
}

TEST_F(SessionManagerTest, IdsAndTokensDiffer) {
  std::set<std::string> ids;
  std::set<SideSocketToken> tokens;
  for (int i = 0; i < 100; ++i) {
    const SessionInfo info = Open(static_cast<char>(i));
    ids.insert(info.session_id);
    tokens.insert(info.token);
  }
  EXPECT_EQ(ids.size(), 100u);
  EXPECT_EQ(tokens.size(), 100u);
}

TEST_F(SessionManagerTest, UnknownSessionIsNotFoundEverywhere) {
  const auto not_found = absl::StatusCode::kNotFound;
  EXPECT_EQ(sessions_->Beat("x").code(), not_found);
  EXPECT_EQ(sessions_->CheckSession("x").code(), not_found);
  EXPECT_EQ(sessions_->CloseSession("x").code(), not_found);
  EXPECT_EQ(sessions_->ListRegions("x").status().code(), not_found);
  EXPECT_EQ(sessions_->Lease("x", "y").status().code(), not_found);
  EXPECT_EQ(sessions_->RetireRegion("x", "y", absl::ZeroDuration()).code(), not_found);
  EXPECT_EQ(sessions_->DepositFd("x", NewMemfd("k", 1)).status().code(), not_found);
  EXPECT_EQ(sessions_->RegisterRegion("x", "n", 1, Whole("memfd", 1)).status().code(), not_found);
}

TEST_F(SessionManagerTest, CloseUnmapsEveryRegion) {
  const SessionInfo session = Open('a');
  MustRegister(session.session_id, "close-one");
  MustRegister(session.session_id, "close-two");
  ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
  EXPECT_FALSE(IsMapped("memfd:keepset-close-"));
  EXPECT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kClosed);
  EXPECT_EQ(sessions_->Beat(session.session_id).code(), absl::StatusCode::kNotFound);
}

TEST_F(SessionManagerTest, SameUuidReplacesTheSession) {
  const SessionInfo first = Open('a');
  MustRegister(first.session_id, "replaced");
  const SessionInfo second = Open('a');
  EXPECT_GT(second.generation, first.generation);
  EXPECT_NE(second.session_id, first.session_id);
  EXPECT_FALSE(IsMapped("memfd:keepset-replaced"));
  EXPECT_EQ(observer_.AwaitEnd(first.session_id), SessionEnd::kReplaced);
  EXPECT_EQ(sessions_->Beat(first.session_id).code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(sessions_->Beat(second.session_id).ok());
}

TEST_F(SessionManagerTest, HangUpOfAReplacedSessionLeavesItsSuccessor) {
  const SessionInfo first = Open('a');
  const SessionInfo second = Open('a');
  sessions_->OnHangUp(first.session_id);
  EXPECT_TRUE(sessions_->Beat(second.session_id).ok());
}

TEST_F(SessionManagerTest, LeaseRunsOut) {
  const SessionInfo session = Open('a');
  MustRegister(session.session_id, "expires");
  clock_.Advance(session.lease - absl::Nanoseconds(1));
  EXPECT_EQ(sessions_->ReapExpired(), 0);
  clock_.Advance(absl::Nanoseconds(1));
  EXPECT_EQ(sessions_->ReapExpired(), 1);
  EXPECT_FALSE(IsMapped("memfd:keepset-expires"));
  EXPECT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kLeaseExpired);
}

TEST_F(SessionManagerTest, EveryCallOfTheSessionRenewsItsLease) {
  const SessionInfo session = Open('a');
  const absl::Duration most = session.lease - absl::Seconds(1);
  const std::string id = MustRegister(session.session_id, "kv");
  clock_.Advance(most);
  ASSERT_TRUE(sessions_->Beat(session.session_id).ok());
  clock_.Advance(most);
  MustLease(session.session_id, id);
  clock_.Advance(most);
  ASSERT_TRUE(sessions_->ListRegions(session.session_id).ok());
  clock_.Advance(most);
  EXPECT_EQ(sessions_->ReapExpired(), 0);
}

TEST_F(SessionManagerTest, SideSocketConnectionHoldsTheSession) {
  const SessionInfo session = Open('a');
  ASSERT_TRUE(sessions_->RedeemToken(session.token, nullptr).ok());
  clock_.Advance(100 * session.lease);
  EXPECT_EQ(sessions_->ReapExpired(), 0);
  sessions_->OnHangUp(session.session_id);
  EXPECT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kHangUp);
}

TEST_F(SessionManagerTest, TokenServesOnce) {
  const SessionInfo session = Open('a');
  EXPECT_EQ(sessions_->RedeemToken(session.token, nullptr).value(), session.session_id);
  EXPECT_EQ(sessions_->RedeemToken(session.token, nullptr).status().code(),
            absl::StatusCode::kPermissionDenied);
}

TEST_F(SessionManagerTest, TokenOfAnEndedSessionIsRefused) {
  const SessionInfo session = Open('a');
  ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
  EXPECT_EQ(sessions_->RedeemToken(session.token, nullptr).status().code(),
            absl::StatusCode::kPermissionDenied);
}

TEST_F(SessionManagerTest, TokenWithOneBitFlippedIsRefused) {
  SessionInfo session = Open('a');
  session.token[31] ^= 1;
  EXPECT_EQ(sessions_->RedeemToken(session.token, nullptr).status().code(),
            absl::StatusCode::kPermissionDenied);
}

TEST_F(SessionManagerTest, CountsEveryKind) {
  const SessionInfo session = Open('a');
  EXPECT_EQ(sessions_->Counts().regions.at(0).regions, 0);
  ASSERT_TRUE(Register(session.session_id, "kv", 3).ok());
  const SessionCounts counts = sessions_->Counts();
  EXPECT_EQ(counts.sessions, 1);
  ASSERT_EQ(counts.regions.size(), 1u);
  EXPECT_EQ(counts.regions[0].kind, "memfd");
  EXPECT_EQ(counts.regions[0].regions, 1);
  EXPECT_EQ(counts.regions[0].bytes, 3 * PageBytes());
}

TEST_F(SessionManagerTest, ShutdownEndsAllAndOpensNone) {
  const SessionInfo session = Open('a');
  MustRegister(session.session_id, "shutdown");
  sessions_->Shutdown();
  EXPECT_FALSE(IsMapped("memfd:keepset-shutdown"));
  EXPECT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kShutdown);
  EXPECT_EQ(sessions_->OpenSession(ArgsOf('b')).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(SessionManagerTest, RegistrationsLeasesAndEndsMayRace) {
  constexpr int kRounds = 50;
  std::vector<std::thread> clients;
  for (char uuid : {'a', 'b', 'a', 'b'}) {  // Pairs replace each other's session.
    clients.emplace_back([this, uuid] {
      for (int round = 0; round < kRounds; ++round) {
        const SessionInfo session = Open(uuid);
        const auto region = Register(session.session_id, "race");
        if (!region.ok()) continue;
        const auto lease = sessions_->Lease(session.session_id, region->region_id);
        if (lease.ok()) {
          EXPECT_EQ(lease->region().data()[5], std::byte{5});
        }
      }
    });
  }
  for (std::thread& client : clients) client.join();
  sessions_->Shutdown();
  EXPECT_FALSE(IsMapped("memfd:keepset-race"));
}

}  // namespace
}  // namespace keepset::service
