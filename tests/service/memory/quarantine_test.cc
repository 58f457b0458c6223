// Memory of the server's own whose session ended without a retire: when it is freed, and when not.
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/memory/session_manager.h"
#include "tests/fakes/fake_clock.h"
#include "tests/service/memory/memory_test_support.h"

namespace keepset::service {
namespace {

using testing::ArgsOf;

constexpr uint64_t kBytes = 4096;
constexpr absl::Duration kQuarantine = absl::Seconds(60);

// Memory that must not be freed while a worker has it mapped.
class ExclusiveTransport : public MemoryTransport {
 public:
  explicit ExclusiveTransport(std::atomic<int>& living) : living_(living) {}

  absl::string_view kind() const override { return "exclusive"; }
  bool needs_fd() const override { return false; }
  absl::StatusOr<std::unique_ptr<MappedRegion>> Open(RegionDescriptor /*descriptor*/) override {
    return std::make_unique<Region>(living_);
  }
  absl::StatusOr<OwnedMemory> Create(uint64_t /*length*/,
                                     const std::string& /*device_uuid*/) override {
    OwnedMemory memory;
    memory.region = std::make_unique<Region>(living_);
    memory.ipc_handle = "handle";
    return memory;
  }

 private:
  class Region : public MappedRegion {
   public:
    explicit Region(std::atomic<int>& living) : living_(living) { ++living_; }
    ~Region() override { --living_; }
    std::byte* data() const override { return nullptr; }
    int64_t size_bytes() const override { return kBytes; }
    RegionAccess access() const override { return RegionAccess::kReadWrite; }
    absl::Status Verify() const override { return absl::OkStatus(); }

   private:
    std::atomic<int>& living_;
  };
  std::atomic<int>& living_;
};

// A process that waits to be killed.
class Worker {
 public:
  Worker() : process_(::fork()) {
    if (process_ == 0) {
      while (true) ::pause();
    }
    pidfd_ =
        std::make_shared<const UniqueFd>(static_cast<int>(::syscall(SYS_pidfd_open, process_, 0)));
  }
  ~Worker() { Kill(); }
  const std::shared_ptr<const UniqueFd>& pidfd() const { return pidfd_; }
  void Kill() {
    if (process_ <= 0) return;
    ::kill(process_, SIGKILL);
    int status = 0;
    ::waitpid(process_, &status, 0);
    process_ = 0;
  }

 private:
  pid_t process_;
  std::shared_ptr<const UniqueFd> pidfd_;
};

class QuarantineTest : public ::testing::Test {
 protected:
  QuarantineTest() {
    std::vector<std::unique_ptr<MemoryTransport>> transports =
        NewBuiltinTransports([](absl::string_view kind) { return kind == "memfd"; });
    transports.push_back(std::make_unique<ExclusiveTransport>(living_));
    sessions_ = SessionManager::New({.max_owned_bytes = 2 * kBytes,
                                     .max_owned_bytes_per_session = 2 * kBytes,
                                     .quarantine = kQuarantine},
                                    std::move(transports), clock_, &observer_);
  }

  SessionInfo Open(char uuid, std::shared_ptr<const UniqueFd> process = nullptr) {
    const auto session = sessions_->OpenSession(ArgsOf(uuid));
    EXPECT_TRUE(session.ok()) << session.status();
    if (process != nullptr) {
      EXPECT_TRUE(sessions_->RedeemToken(session->token, process).ok());
    }
    return *session;
  }
  std::string Allocate(const SessionInfo& session, const std::string& kind = "exclusive") {
    const auto region = sessions_->AllocateRegion(session.session_id, "out", kind, kBytes, "");
    EXPECT_TRUE(region.ok()) << region.status();
    return region.ok() ? region->info.region_id : "";
  }
  SessionCounts::ByKind Count(absl::string_view kind = "exclusive") const {
    for (const SessionCounts::ByKind& by_kind : sessions_->Counts().regions) {
      if (by_kind.kind == kind) return by_kind;
    }
    return {};
  }
  void SweepAfter(absl::Duration time) {
    clock_.Advance(time);
    sessions_->SweepQuarantine();
  }

  std::atomic<int> living_ = 0;
  fakes::FakeClock clock_;
  testing::RecordingObserver observer_;
  std::unique_ptr<SessionManager> sessions_;
};

TEST_F(QuarantineTest, MemoryOfARetiredRegionIsFreedAtOnce) {
  const SessionInfo session = Open('a');
  const std::string id = Allocate(session);
  EXPECT_EQ(living_, 1);
  EXPECT_TRUE(sessions_->RetireRegion(session.session_id, id, absl::ZeroDuration()).ok());
  EXPECT_EQ(living_, 0);
}

TEST_F(QuarantineTest, WithoutAProcessToWatchItIsFreedAfterTheTime) {
  const SessionInfo session = Open('a');
  Allocate(session);
  ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
  SweepAfter(kQuarantine - absl::Seconds(1));
  EXPECT_EQ(living_, 1);
  EXPECT_EQ(Count().quarantined_regions, 1);
  EXPECT_EQ(Count().quarantined_bytes, kBytes);
  SweepAfter(absl::Seconds(1));
  EXPECT_EQ(living_, 0);
  EXPECT_EQ(Count().quarantined_regions, 0);
  EXPECT_EQ(Count().quarantined_bytes, 0u);
  EXPECT_EQ(Count().owned_bytes, 0u);
}

TEST_F(QuarantineTest, AProcessThatLivesKeepsItForAsLongAsItTakes) {
  const Worker worker;
  const SessionInfo session = Open('a', worker.pidfd());
  Allocate(session);
  sessions_->OnHangUp(session.session_id);
  SweepAfter(10 * kQuarantine);
  EXPECT_EQ(living_, 1);
}

TEST_F(QuarantineTest, TheEndOfTheProcessFreesItAfterTheTime) {
  Worker worker;
  const SessionInfo session = Open('a', worker.pidfd());
  Allocate(session);
  sessions_->OnHangUp(session.session_id);
  sessions_->SweepQuarantine();
  EXPECT_EQ(living_, 1);
  worker.Kill();
  SweepAfter(10 * kQuarantine);
  EXPECT_EQ(living_, 1) << "its work may still run";
  SweepAfter(kQuarantine);
  EXPECT_EQ(living_, 0);
}

TEST_F(QuarantineTest, EveryEndOfASessionButTheRetireQuarantines) {
  const Worker worker;
  const SessionInfo closed = Open('a', worker.pidfd());
  Allocate(closed);
  ASSERT_TRUE(sessions_->CloseSession(closed.session_id).ok());
  const SessionInfo replaced = Open('b', worker.pidfd());
  Allocate(replaced);
  Open('b', worker.pidfd());
  sessions_->SweepQuarantine();
  EXPECT_EQ(living_, 2);
  EXPECT_EQ(Count().quarantined_regions, 2);
}

TEST_F(QuarantineTest, AnExpiredLeaseQuarantines) {
  Allocate(Open('a'));
  clock_.Advance(absl::Hours(1));
  EXPECT_EQ(sessions_->ReapExpired(), 1);
  sessions_->SweepQuarantine();
  EXPECT_EQ(living_, 1);
  EXPECT_EQ(Count().quarantined_regions, 1);
}

TEST_F(QuarantineTest, AShutdownQuarantines) {
  Allocate(Open('a'));
  sessions_->Shutdown();
  sessions_->SweepQuarantine();
  EXPECT_EQ(Count().quarantined_regions, 1);
  EXPECT_EQ(living_, 1);
}

TEST_F(QuarantineTest, TheWorkersWordIsTakenAfterTheSession) {
  const Worker worker;
  const SessionInfo session = Open('a', worker.pidfd());
  const std::string id = Allocate(session);
  Open('a', worker.pidfd());
  EXPECT_EQ(living_, 1);
  EXPECT_TRUE(sessions_->RetireRegion(session.session_id, id, absl::ZeroDuration()).ok());
  EXPECT_EQ(living_, 0);
  EXPECT_EQ(Count().owned_bytes, 0u);
}

TEST_F(QuarantineTest, TheWordOfAnotherSessionIsNotTaken) {
  const Worker worker;
  const SessionInfo session = Open('a', worker.pidfd());
  const std::string id = Allocate(session);
  ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
  const SessionInfo other = Open('b');
  EXPECT_EQ(sessions_->RetireRegion(other.session_id, id, absl::ZeroDuration()).code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(sessions_->RetireRegion("nobody", id, absl::ZeroDuration()).code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(living_, 1);
}

TEST_F(QuarantineTest, AnOperationKeepsItBeyondTheEndOfTheProcess) {
  Worker worker;
  const SessionInfo session = Open('a', worker.pidfd());
  const std::string id = Allocate(session);
  {
    const auto lease = sessions_->Lease(session.session_id, id);
    ASSERT_TRUE(lease.ok());
    worker.Kill();
    sessions_->OnHangUp(session.session_id);
    sessions_->SweepQuarantine();
    SweepAfter(kQuarantine);
    EXPECT_EQ(living_, 1);
    EXPECT_EQ(Count().quarantined_bytes, kBytes);
  }
  sessions_->SweepQuarantine();
  EXPECT_EQ(living_, 0);
  EXPECT_EQ(Count().quarantined_bytes, 0u);
}

TEST_F(QuarantineTest, ARetireThatWaitsForAnOperationNeedsNoQuarantine) {
  const SessionInfo session = Open('a');
  const std::string id = Allocate(session);
  {
    const auto lease = sessions_->Lease(session.session_id, id);
    ASSERT_TRUE(lease.ok());
    EXPECT_EQ(sessions_->RetireRegion(session.session_id, id, absl::ZeroDuration()).code(),
              absl::StatusCode::kDeadlineExceeded);
    ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
    EXPECT_EQ(Count().quarantined_regions, 0);
  }
  EXPECT_EQ(living_, 0);
}

TEST_F(QuarantineTest, QuarantinedBytesCountAgainstTheServersLimit) {
  for (const char uuid : {'a', 'b'}) {
    const SessionInfo session = Open(uuid);
    Allocate(session);
    ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
  }
  const SessionInfo third = Open('c');
  const auto allocate = [&] {
    return sessions_->AllocateRegion(third.session_id, "out", "exclusive", kBytes, "").status();
  };
  EXPECT_EQ(allocate().code(), absl::StatusCode::kResourceExhausted);
  SweepAfter(kQuarantine);
  EXPECT_TRUE(allocate().ok());
}

TEST_F(QuarantineTest, ARetireThatWaitsInTurnsSucceedsOverTheEndOfItsSession) {
  const SessionInfo session = Open('a');
  const std::string id = Allocate(session);
  const auto retire = [&] {
    return sessions_->RetireRegion(session.session_id, id, absl::ZeroDuration()).code();
  };
  {
    const auto lease = sessions_->Lease(session.session_id, id);
    ASSERT_TRUE(lease.ok());
    EXPECT_EQ(retire(), absl::StatusCode::kDeadlineExceeded);
    ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
    sessions_->SweepQuarantine();
    EXPECT_EQ(retire(), absl::StatusCode::kDeadlineExceeded);
  }
  sessions_->SweepQuarantine();
  EXPECT_EQ(retire(), absl::StatusCode::kOk);
}

// Looks for the region where the end of a session is told.
class RetiringObserver : public SessionObserver {
 public:
  void OnRegionQuarantined(const RegionInfo& region, QuarantineEnd /*until*/) override {
    status = sessions->RetireRegion(session_id, region.region_id, absl::ZeroDuration());
  }
  SessionManager* sessions = nullptr;
  std::string session_id;
  absl::Status status = absl::UnknownError("not told");
};

TEST_F(QuarantineTest, ARetireWhileTheSessionEndsFindsTheRegion) {
  std::vector<std::unique_ptr<MemoryTransport>> transports;
  transports.push_back(std::make_unique<ExclusiveTransport>(living_));
  RetiringObserver observer;
  const auto sessions = SessionManager::New({}, std::move(transports), clock_, &observer);
  observer.sessions = sessions.get();
  const auto session = sessions->OpenSession(ArgsOf('a'));
  ASSERT_TRUE(session.ok());
  observer.session_id = session->session_id;
  for (const char* const name : {"one", "two"}) {
    ASSERT_TRUE(sessions->AllocateRegion(session->session_id, name, "exclusive", kBytes, "").ok());
  }
  ASSERT_TRUE(sessions->CloseSession(session->session_id).ok());
  EXPECT_TRUE(observer.status.ok()) << observer.status;
  EXPECT_EQ(living_, 0);
}

TEST_F(QuarantineTest, WhatAClientLeftCountsAgainstItsNextSession) {
  const Worker worker;
  for (int i = 0; i < 2; ++i) Allocate(Open('a', worker.pidfd()));
  const SessionInfo third = Open('a', worker.pidfd());
  const absl::Status status =
      sessions_->AllocateRegion(third.session_id, "out", "exclusive", kBytes, "").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()),
              ::testing::HasSubstr("memory.max_owned_bytes_per_session"));
}

TEST_F(QuarantineTest, QuarantinedMemoryIsNobodysRegion) {
  const Worker worker;
  const SessionInfo session = Open('a', worker.pidfd());
  const std::string id = Allocate(session);
  const SessionInfo next = Open('a', worker.pidfd());
  EXPECT_EQ(sessions_->Lease(session.session_id, id).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(sessions_->Lease(next.session_id, id).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(QuarantineTest, MemoryWhoseUsersTheKernelCountsIsFreedAtOnce) {
  const Worker worker;
  const SessionInfo session = Open('a', worker.pidfd());
  Allocate(session, "memfd");
  EXPECT_TRUE(testing::IsMapped("keepset-owned"));
  sessions_->OnHangUp(session.session_id);
  EXPECT_FALSE(testing::IsMapped("keepset-owned"));
  EXPECT_EQ(Count("memfd").owned_bytes, 0u);
  EXPECT_EQ(Count("memfd").quarantined_regions, 0);
}

TEST_F(QuarantineTest, MemoryOfAWorkerIsNotQuarantined) {
  const Worker worker;
  const SessionInfo session = Open('a', worker.pidfd());
  ASSERT_TRUE(
      sessions_->RegisterRegion(session.session_id, "kv", 0, testing::Whole("exclusive", kBytes))
          .ok());
  sessions_->OnHangUp(session.session_id);
  EXPECT_EQ(living_, 0);
}

}  // namespace
}  // namespace keepset::service
