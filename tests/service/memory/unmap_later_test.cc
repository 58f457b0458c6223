// Threads that must not wait do not, whatever the driver takes its time for.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/synchronization/notification.h"
#include "base/clock.h"
#include "service/memory/cuda_driver.h"
#include "service/memory/cuda_transports.h"
#include "service/memory/session_manager.h"
#include "tests/fakes/fake_clock.h"
#include "tests/service/memory/memory_test_support.h"

namespace keepset::service {
namespace {

constexpr uint64_t kBytes = 2 << 20;

// Where a call of the driver stands until it is let go. One that is not let go in time was waited
// for.
class Standstill {
 public:
  void Stand() {
    entered_.Notify();
    was_let_go_ = let_go_.WaitForNotificationWithTimeout(absl::Seconds(10));
  }
  void AwaitEntered() { entered_.WaitForNotification(); }
  void LetGo() { let_go_.Notify(); }
  bool was_let_go() const { return was_let_go_; }

 private:
  absl::Notification entered_;
  absl::Notification let_go_;
  bool was_let_go_ = false;
};

// One device; every handle opens at the same address.
class StandingDriver final : public CudaDriver {
 public:
  const std::vector<CudaDevice>& devices() const override { return devices_; }
  absl::StatusOr<DeviceRange> OpenIpc(int, absl::string_view) override {
    if (standstill != nullptr) standstill->Stand();
    return DeviceRange{kBytes, kBytes, 0};
  }
  absl::Status CloseIpc(int, uint64_t) override {
    ++closed;
    return absl::OkStatus();
  }
  absl::StatusOr<DeviceRange> MapVmm(int, int, uint64_t, RegionAccess) override { return kNone; }
  absl::Status UnmapVmm(int, const DeviceRange&) override { return kNone; }
  absl::StatusOr<ExportedIpc> AllocateIpc(int, uint64_t) override { return kNone; }
  absl::Status FreeIpc(int, uint64_t) override { return kNone; }
  absl::StatusOr<ExportedVmm> AllocateVmm(int, uint64_t) override { return kNone; }

  Standstill* standstill = nullptr;
  int closed = 0;

 private:
  const absl::Status kNone = absl::UnimplementedError("legacy IPC only");
  const std::vector<CudaDevice> devices_ = {
      {0, "GPU-00000000-0000-0000-0000-000000000001", "device", "", "", ""}};
};

class UnmapLaterTest : public ::testing::Test {
 protected:
  UnmapLaterTest() {
    std::vector<std::unique_ptr<MemoryTransport>> transports;
    transports.push_back(
        NewCudaIpcTransport([this]() -> absl::StatusOr<std::shared_ptr<CudaDriver>> {
          if (loading_ != nullptr) loading_->Stand();
          return driver_;
        }));
    sessions_ = SessionManager::New(
        SessionLimits(), std::move(transports), clock_, &observer_,
        [this](absl::AnyInvocable<void()> unmap) { later_.push_back(std::move(unmap)); });
  }

  SessionInfo Open(char uuid) {
    auto info = sessions_->OpenSession(testing::ArgsOf(uuid));
    EXPECT_TRUE(info.ok()) << info.status();
    return info.value_or(SessionInfo());
  }

  void Register(const SessionInfo& session) {
    RegionDescriptor descriptor;
    descriptor.kind = "cuda_ipc";
    descriptor.ipc_handle = std::string(64, 'h');
    descriptor.allocation_bytes = kBytes;
    descriptor.length = kBytes;
    descriptor.device_uuid = driver_->devices()[0].uuid;
    const auto region =
        sessions_->RegisterRegion(session.session_id, "r", 0, std::move(descriptor));
    EXPECT_TRUE(region.ok()) << region.status();
  }

  uint64_t DeviceBytes() const { return sessions_->Counts().regions[0].device_bytes; }

  const std::shared_ptr<StandingDriver> driver_ = std::make_shared<StandingDriver>();
  Standstill* loading_ = nullptr;
  fakes::FakeClock clock_;
  testing::RecordingObserver observer_;
  std::vector<absl::AnyInvocable<void()>> later_;
  std::unique_ptr<SessionManager> sessions_;
};

TEST_F(UnmapLaterTest, CountsDoNotWaitForAMappingThatIsBeingMade) {
  const SessionInfo session = Open('a');
  Standstill open;
  driver_->standstill = &open;
  std::thread worker([&] { Register(session); });
  open.AwaitEntered();
  EXPECT_EQ(DeviceBytes(), 0u);
  open.LetGo();
  worker.join();
  EXPECT_TRUE(open.was_let_go());
  EXPECT_EQ(DeviceBytes(), kBytes);
}

TEST_F(UnmapLaterTest, CountsDoNotWaitForADriverThatIsBeingLoaded) {
  const SessionInfo session = Open('a');
  Standstill load;
  loading_ = &load;
  std::thread worker([&] { Register(session); });
  load.AwaitEntered();
  EXPECT_EQ(DeviceBytes(), 0u);
  load.LetGo();
  worker.join();
  EXPECT_TRUE(load.was_let_go());
}

TEST_F(UnmapLaterTest, HangUpLeavesTheUnmappingToAnotherThread) {
  const SessionInfo session = Open('a');
  Register(session);
  sessions_->OnHangUp(session.session_id);
  EXPECT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kHangUp);
  EXPECT_EQ(driver_->closed, 0);
  EXPECT_EQ(DeviceBytes(), kBytes);
  ASSERT_EQ(later_.size(), 1u);
  later_[0]();
  EXPECT_EQ(driver_->closed, 1);
  EXPECT_EQ(DeviceBytes(), 0u);
}

TEST_F(UnmapLaterTest, ExpiryLeavesTheUnmappingToAnotherThread) {
  const SessionInfo session = Open('a');
  Register(session);
  clock_.Advance(session.lease);
  EXPECT_EQ(sessions_->ReapExpired(), 1);
  EXPECT_EQ(driver_->closed, 0);
  ASSERT_EQ(later_.size(), 1u);
  later_[0]();
  EXPECT_EQ(driver_->closed, 1);
}

// Its caller learns by the answer that the memory is its own again.
TEST_F(UnmapLaterTest, CloseUnmapsBeforeItReturns) {
  const SessionInfo session = Open('a');
  Register(session);
  ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
  EXPECT_EQ(driver_->closed, 1);
  EXPECT_TRUE(later_.empty());
}

}  // namespace
}  // namespace keepset::service
