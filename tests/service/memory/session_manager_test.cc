#include "service/memory/session_manager.h"

#include <atomic>
#include <functional>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/fake_clock.h"
#include "tests/service/memory/memory_test_support.h"

namespace keepset::service {
namespace {

using testing::ArgsOf;
using testing::IsMapped;
using testing::NewMemfd;
using testing::PageBytes;
using testing::Whole;

class SessionManagerTest : public ::testing::Test {
 protected:
  explicit SessionManagerTest(const SessionLimits& limits = SessionLimits())
      : sessions_(SessionManager::New(
            limits, NewBuiltinTransports([](absl::string_view kind) { return kind == "memfd"; }),
            clock_, &observer_)) {}

  SessionInfo Open(char uuid) {
    auto info = sessions_->OpenSession(ArgsOf(uuid));
    EXPECT_TRUE(info.ok()) << info.status();
    return info.value_or(SessionInfo());
  }

  absl::StatusOr<RegionInfo> Register(const std::string& session_id, const std::string& name,
                                      uint64_t pages = 1) {
    const uint64_t bytes = pages * PageBytes();
    const auto token = sessions_->DepositFd(session_id, NewMemfd("keepset-" + name, bytes));
    if (!token.ok()) return token.status();
    return sessions_->RegisterRegion(session_id, name, *token, Whole("memfd", bytes));
  }

  std::string MustRegister(const std::string& session_id, const std::string& name) {
    const auto region = Register(session_id, name);
    EXPECT_TRUE(region.ok()) << region.status();
    return region.ok() ? region->region_id : "";
  }

  RegionLease MustLease(const std::string& session_id, const std::string& region_id) {
    auto lease = sessions_->Lease(session_id, region_id);
    EXPECT_TRUE(lease.ok()) << lease.status();
    return lease.ok() ? *std::move(lease) : RegionLease();
  }

  fakes::FakeClock clock_;
  testing::RecordingObserver observer_;
  std::unique_ptr<SessionManager> sessions_;
};

TEST_F(SessionManagerTest, LeaseShowsTheClientsBytes) {
  const SessionInfo session = Open('a');
  const RegionLease lease = MustLease(session.session_id, MustRegister(session.session_id, "kv"));
  EXPECT_EQ(lease.region().data()[250], std::byte{250});
}

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
  EXPECT_EQ(
      sessions_->RegisterRegion(session.session_id, "kv", 0, std::move(descriptor)).status().code(),
      absl::StatusCode::kNotFound);
  EXPECT_THAT(observer_.refused_kinds(), ::testing::ElementsAre("unknown"));
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
  ASSERT_TRUE(sessions_->RedeemToken(session.token, 0, 0).ok());
  clock_.Advance(100 * session.lease);
  EXPECT_EQ(sessions_->ReapExpired(), 0);
  sessions_->OnHangUp(session.session_id);
  EXPECT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kHangUp);
}

TEST_F(SessionManagerTest, TokenServesOnce) {
  const SessionInfo session = Open('a');
  EXPECT_EQ(sessions_->RedeemToken(session.token, 0, 0).value(), session.session_id);
  EXPECT_EQ(sessions_->RedeemToken(session.token, 0, 0).status().code(),
            absl::StatusCode::kPermissionDenied);
}

TEST_F(SessionManagerTest, TokenOfAnEndedSessionIsRefused) {
  const SessionInfo session = Open('a');
  ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
  EXPECT_EQ(sessions_->RedeemToken(session.token, 0, 0).status().code(),
            absl::StatusCode::kPermissionDenied);
}

TEST_F(SessionManagerTest, TokenWithOneBitFlippedIsRefused) {
  SessionInfo session = Open('a');
  session.token[31] ^= 1;
  EXPECT_EQ(sessions_->RedeemToken(session.token, 0, 0).status().code(),
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

// Maps a page of its own; Verify answers as told, and Open runs what the test put there first.
struct Script {
  std::function<void()> on_open = [] {};
  absl::Status verify;
  std::atomic<int> mapped = 0;
};

class ScriptedTransport : public MemoryTransport {
 public:
  explicit ScriptedTransport(Script& script) : script_(script) {}

  absl::string_view kind() const override { return "scripted"; }
  bool needs_fd() const override { return false; }
  absl::StatusOr<std::unique_ptr<MappedRegion>> Open(RegionDescriptor /*descriptor*/) override {
    script_.on_open();
    return std::make_unique<Region>(script_);
  }

 private:
  class Region : public MappedRegion {
   public:
    explicit Region(Script& script) : script_(script) { ++script_.mapped; }
    ~Region() override { --script_.mapped; }
    std::byte* data() const override { return nullptr; }
    int64_t size_bytes() const override { return 0; }
    RegionAccess access() const override { return RegionAccess::kReadOnly; }
    absl::Status Verify() const override { return script_.verify; }

   private:
    Script& script_;
  };
  Script& script_;
};

class ScriptedTransportTest : public ::testing::Test {
 protected:
  static std::vector<std::unique_ptr<MemoryTransport>> Transports(Script& script) {
    std::vector<std::unique_ptr<MemoryTransport>> transports;
    transports.push_back(std::make_unique<ScriptedTransport>(script));
    return transports;
  }

  absl::StatusOr<RegionInfo> Register() {
    return sessions_->RegisterRegion(session_.session_id, "kv", 0, Whole("scripted", 1));
  }

  fakes::FakeClock clock_;
  Script script_;
  std::unique_ptr<SessionManager> sessions_ =
      SessionManager::New(SessionLimits(), Transports(script_), clock_, nullptr);
  SessionInfo session_ = sessions_->OpenSession(ArgsOf('a')).value();
};

TEST_F(ScriptedTransportTest, MemoryThatFailsVerifyIsNotLeased) {
  const auto region = Register();
  ASSERT_TRUE(region.ok()) << region.status();
  script_.verify = absl::FailedPreconditionError("shrunk");
  EXPECT_EQ(sessions_->Lease(session_.session_id, region->region_id).status(), script_.verify);
  EXPECT_EQ(sessions_->ListRegions(session_.session_id)->at(0).leases, 0);
}

TEST_F(ScriptedTransportTest, SessionThatEndsWhileItsRegionIsMappedKeepsNothing) {
  script_.on_open = [this] { ASSERT_TRUE(sessions_->CloseSession(session_.session_id).ok()); };
  EXPECT_EQ(Register().status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(script_.mapped, 0);
}

TEST_F(ScriptedTransportTest, NameIsTakenWhileItsRegionIsMapped) {
  absl::StatusCode inner = absl::StatusCode::kOk;
  script_.on_open = [&] { inner = Register().status().code(); };
  EXPECT_TRUE(Register().ok());
  EXPECT_EQ(inner, absl::StatusCode::kAlreadyExists);
}

TEST_F(ScriptedTransportTest, OtherCallsAreServedWhileARegionIsMapped) {
  absl::Status beat = absl::UnknownError("not called");
  script_.on_open = [&] { beat = sessions_->Beat(session_.session_id); };
  EXPECT_TRUE(Register().ok());
  EXPECT_TRUE(beat.ok()) << beat;
}

class SmallLimitsTest : public SessionManagerTest {
 protected:
  SmallLimitsTest() : SessionManagerTest(Limits()) {}

  static SessionLimits Limits() {
    SessionLimits limits;
    limits.max_sessions = 2;
    limits.max_regions_per_session = 2;
    limits.max_region_bytes_per_session = 4 * PageBytes();
    return limits;
  }
};

TEST_F(SmallLimitsTest, SessionsAreLimited) {
  Open('a');
  Open('b');
  EXPECT_EQ(sessions_->OpenSession(ArgsOf('c')).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST_F(SmallLimitsTest, ReplacementNeedsNoFreePlace) {
  Open('a');
  Open('b');
  Open('b');
  EXPECT_EQ(sessions_->Counts().sessions, 2);
}

TEST_F(SmallLimitsTest, RegionsAreLimited) {
  const SessionInfo session = Open('a');
  MustRegister(session.session_id, "one");
  MustRegister(session.session_id, "two");
  EXPECT_EQ(Register(session.session_id, "three").status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST_F(SmallLimitsTest, BytesAreLimited) {
  const SessionInfo session = Open('a');
  ASSERT_TRUE(Register(session.session_id, "one", 3).ok());
  EXPECT_EQ(Register(session.session_id, "two", 2).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(Register(session.session_id, "three", 1).ok());
}

TEST_F(SmallLimitsTest, LengthThatWouldWrapTheSumIsRefused) {
  const SessionInfo session = Open('a');
  MustRegister(session.session_id, "one");
  const auto token = sessions_->DepositFd(session.session_id, NewMemfd("k", PageBytes()));
  EXPECT_EQ(sessions_
                ->RegisterRegion(session.session_id, "two", *token,
                                 Whole("memfd", std::numeric_limits<uint64_t>::max()))
                .status()
                .code(),
            absl::StatusCode::kResourceExhausted);
}

TEST_F(SmallLimitsTest, RetiredRegionsFreeTheirQuota) {
  const SessionInfo session = Open('a');
  for (int i = 0; i < 10; ++i) {
    const std::string id = MustRegister(session.session_id, "kv");
    RegionLease lease = MustLease(session.session_id, id);
    ASSERT_FALSE(sessions_->RetireRegion(session.session_id, id, absl::ZeroDuration()).ok());
    lease = RegionLease();
  }
  EXPECT_TRUE(sessions_->ListRegions(session.session_id)->empty());
}

}  // namespace
}  // namespace keepset::service
