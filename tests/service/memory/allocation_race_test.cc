// Sessions that end while memory of the server's own is being made for them.
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "gtest/gtest.h"
#include "service/memory/session_manager.h"
#include "tests/fakes/fake_clock.h"
#include "tests/service/memory/memory_test_support.h"

namespace keepset::service {
namespace {

constexpr uint64_t kBytes = 4096;

// What a device does that takes its time.
struct Making {
  absl::Notification has_begun;
  absl::Notification may_end;
};

class SlowTransport : public MemoryTransport {
 public:
  SlowTransport(Making& making, int& living) : making_(making), living_(living) {}

  absl::string_view kind() const override { return "slow"; }
  bool needs_fd() const override { return false; }
  absl::StatusOr<std::unique_ptr<MappedRegion>> Open(RegionDescriptor /*descriptor*/) override {
    return absl::UnimplementedError("nobody registers any");
  }
  // The first takes its time.
  absl::StatusOr<OwnedMemory> Create(uint64_t /*length*/,
                                     const std::string& /*device_uuid*/) override {
    OwnedMemory memory;
    memory.region = std::make_unique<Region>(living_);
    memory.ipc_handle = "handle";
    if (making_.has_begun.HasBeenNotified()) return memory;
    making_.has_begun.Notify();
    making_.may_end.WaitForNotification();
    return memory;
  }

 private:
  class Region : public MappedRegion {
   public:
    explicit Region(int& living) : living_(living) { ++living_; }
    ~Region() override { --living_; }
    std::byte* data() const override { return nullptr; }
    int64_t size_bytes() const override { return kBytes; }
    RegionAccess access() const override { return RegionAccess::kReadWrite; }
    absl::Status Verify() const override { return absl::OkStatus(); }

   private:
    int& living_;
  };
  Making& making_;
  int& living_;
};

class AllocationRace : public ::testing::Test {
 protected:
  AllocationRace() {
    std::vector<std::unique_ptr<MemoryTransport>> transports;
    transports.push_back(std::make_unique<SlowTransport>(making_, living_));
    sessions_ =
        SessionManager::New({.max_owned_bytes = kBytes, .max_owned_bytes_per_session = kBytes},
                            std::move(transports), clock_, nullptr);
    session_ = *sessions_->OpenSession(testing::ArgsOf('a'));
  }
  absl::Status Allocate(const SessionInfo& session) {
    return sessions_->AllocateRegion(session.session_id, "out", "slow", kBytes, "").status();
  }
  // What an allocation answers during which `end` ends its session.
  template <typename End>
  absl::Status AllocateWhile(End end) {
    absl::Status allocated;
    std::thread allocator([&] { allocated = Allocate(session_); });
    making_.has_begun.WaitForNotification();
    end();
    making_.may_end.Notify();
    allocator.join();
    return allocated;
  }
  // The worker has heard of nothing: nothing of it is left, in quarantine neither.
  void ExpectNothingLeft() {
    EXPECT_EQ(living_, 0);
    const SessionCounts::ByKind counts = sessions_->Counts().regions.at(0);
    EXPECT_EQ(counts.owned_bytes, 0u);
    EXPECT_EQ(counts.quarantined_regions, 0);
    EXPECT_EQ(counts.regions, 0);
  }

  Making making_;
  int living_ = 0;
  fakes::FakeClock clock_;
  std::unique_ptr<SessionManager> sessions_;
  SessionInfo session_;
};

TEST_F(AllocationRace, AClosedSessionGetsNothing) {
  const absl::Status status =
      AllocateWhile([&] { EXPECT_TRUE(sessions_->CloseSession(session_.session_id).ok()); });
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  ExpectNothingLeft();
}

TEST_F(AllocationRace, AShutDownServerGivesNothing) {
  EXPECT_EQ(AllocateWhile([&] { sessions_->Shutdown(); }).code(), absl::StatusCode::kNotFound);
  ExpectNothingLeft();
}

TEST_F(AllocationRace, AReplacedSessionLeavesNameAndBytesToTheNext) {
  absl::StatusOr<SessionInfo> next;
  const absl::Status status =
      AllocateWhile([&] { next = sessions_->OpenSession(testing::ArgsOf('a')); });
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  ExpectNothingLeft();
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_TRUE(Allocate(*next).ok());
}

TEST_F(AllocationRace, BytesOfMemoryBeingMadeAreTaken) {
  const absl::Status status = AllocateWhile([&] {
    EXPECT_EQ(sessions_->AllocateRegion(session_.session_id, "more", "slow", 1, "").status().code(),
              absl::StatusCode::kResourceExhausted);
  });
  EXPECT_TRUE(status.ok()) << status;
}

}  // namespace
}  // namespace keepset::service
