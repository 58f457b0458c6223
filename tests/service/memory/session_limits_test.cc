// The session manager at its limits, and over a transport that does as the test says.
#include <atomic>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "service/memory/session_manager.h"
#include "tests/fakes/fake_clock.h"
#include "tests/service/memory/memory_test_support.h"
#include "tests/service/memory/session_manager_fixture.h"

namespace keepset::service {
namespace {

using testing::ArgsOf;
using testing::NewMemfd;
using testing::PageBytes;
using testing::SessionManagerTest;
using testing::Whole;

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
