// Device memory of our own for workers, over a driver of host memory (tests/fakes/fake_libcuda.cc).
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "service/memory/cuda_driver.h"
#include "service/memory/cuda_transports.h"
#include "service/memory/session_manager.h"
#include "tests/fakes/device_exporter.h"
#include "tests/service/memory/cuda_test_support.h"
#include "tests/service/memory/memory_test_support.h"

namespace keepset::service {
namespace {

using fakes::kFakeDeviceUuid;
using fakes::kSecondFakeDeviceUuid;
using ::testing::HasSubstr;

constexpr uint64_t kGranule = 2 << 20;

// What the driver hands out holds rubbish, as on a device.
class CudaOwnedMemory : public ::testing::Test {
 protected:
  explicit CudaOwnedMemory(const std::string& kind)
      : transport_(kind == "cuda_ipc" ? NewCudaIpcTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA))
                                      : NewCudaVmmTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA))) {
    ::setenv("KEEPSET_FAKE_DIRTY_MEMORY", "1", 1);
  }
  ~CudaOwnedMemory() override {
    for (const char* const name : {"KEEPSET_FAKE_DIRTY_MEMORY", "KEEPSET_FAKE_ALLOCATE_ERROR",
                                   "KEEPSET_FAKE_SHARED_BLOCK", "KEEPSET_FAKE_GRANULARITY"}) {
      ::unsetenv(name);
    }
  }
  absl::StatusOr<OwnedMemory> Create(uint64_t length,
                                     const std::string& device_uuid = kFakeDeviceUuid) {
    return transport_->Create(length, device_uuid);
  }
  // Takes the transport.
  std::unique_ptr<SessionManager> Sessions(const SessionLimits& limits) {
    std::vector<std::unique_ptr<MemoryTransport>> transports;
    transports.push_back(std::move(transport_));
    return SessionManager::New(limits, std::move(transports), SystemClock(), nullptr);
  }

  std::unique_ptr<MemoryTransport> transport_;
};

class CudaOwnedByIpc : public CudaOwnedMemory {
 protected:
  CudaOwnedByIpc() : CudaOwnedMemory("cuda_ipc") {}
};

class CudaOwnedByDescriptor : public CudaOwnedMemory {
 protected:
  CudaOwnedByDescriptor() : CudaOwnedMemory("cuda_vmm") {}
};

// By the kind of memory.
class CudaOwned : public CudaOwnedMemory, public ::testing::WithParamInterface<const char*> {
 protected:
  CudaOwned() : CudaOwnedMemory(GetParam()) {}
  static bool IsIpc() { return std::string(GetParam()) == "cuda_ipc"; }
};

// Maps the memory in a process of its own, as a worker does, and runs `work` on it there.
bool InAWorker(const OwnedMemory& memory, uint64_t bytes,
               const std::function<bool(unsigned char*)>& work) {
  const pid_t process = ::fork();
  if (process == 0) {
    const auto driver = CudaDriver::Load(KEEPSET_FAKE_LIBCUDA);
    if (!driver.ok()) ::_exit(2);
    const auto range = memory.fd.valid()
                           ? (*driver)->MapVmm(0, memory.fd.get(), bytes, RegionAccess::kReadWrite)
                           : (*driver)->OpenIpc(0, memory.ipc_handle);
    if (!range.ok() || range->bytes != bytes) ::_exit(3);
    ::_exit(work(reinterpret_cast<unsigned char*>(range->base)) ? 0 : 1);
  }
  int status = 0;
  return ::waitpid(process, &status, 0) == process && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST_P(CudaOwned, AWorkerMapsZerosAndBothSeeWhatIsWritten) {
  const auto memory = Create(kGranule);
  ASSERT_TRUE(memory.ok()) << memory.status();
  const MappedRegion& region = *memory->region;
  EXPECT_EQ(region.kind(), GetParam());
  EXPECT_EQ(region.space(), MemorySpace::kDevice);
  EXPECT_EQ(region.access(), RegionAccess::kReadWrite);
  region.data()[5] = std::byte{7};
  EXPECT_TRUE(InAWorker(*memory, kGranule, [](unsigned char* data) {
    const bool is_ours = data[5] == 7;
    data[5] = 0;
    const bool is_zero = std::all_of(data, data + kGranule, [](unsigned char c) { return c == 0; });
    data[6] = 8;
    return is_ours && is_zero;
  }));
  EXPECT_EQ(region.data()[6], std::byte{8});
}

TEST_P(CudaOwned, AllocationsAreWholeGranules) {
  EXPECT_EQ(transport_->AllocationBytes(1), kGranule);
  EXPECT_EQ(transport_->AllocationBytes(kGranule), kGranule);
  EXPECT_EQ(transport_->AllocationBytes(kGranule + 1), 2 * kGranule);
  const auto memory = Create(kGranule + 1);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(memory->region->size_bytes(), static_cast<int64_t>(kGranule + 1));
  EXPECT_TRUE(InAWorker(*memory, 2 * kGranule, [](unsigned char*) { return true; }));
}

TEST_P(CudaOwned, ItsEndGivesTheMemoryBackToTheDriver) {
  auto memory = Create(kGranule);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(DriverMappings(), 1);
  memory->region.reset();
  EXPECT_EQ(DriverMappings(), 0);
  EXPECT_EQ(CallFake("fake_cuda_context_depth"), 0);
}

TEST_P(CudaOwned, OnlyTheNamedDeviceGetsAContext) {
  const auto memory = Create(kGranule, kSecondFakeDeviceUuid);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(RetainedContexts(0), 0);
  EXPECT_EQ(RetainedContexts(1), 1);
}

TEST_P(CudaOwned, ADeviceThatIsNotHereIsNamedWithThoseThatAre) {
  const absl::Status status = Create(kGranule, "GPU-0").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr(kFakeDeviceUuid));
}

TEST_P(CudaOwned, ADeviceWithoutMemorySaysWhoseLimitItIs) {
  ::setenv("KEEPSET_FAKE_ALLOCATE_ERROR", "2", 1);
  const absl::Status status = Create(kGranule).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr(IsIpc() ? "cuMemAlloc: " : "cuMemCreate: "));
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("the device has no memory left: ask for less"));
  EXPECT_EQ(DriverMappings(), 0);
}

// The caller named no handle that could be wrong.
TEST_P(CudaOwned, AValueThatTheDriverRefusesIsNotTheCallers) {
  ::setenv("KEEPSET_FAKE_ALLOCATE_ERROR", "1", 1);
  const absl::Status status = Create(kGranule).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), ::testing::Not(HasSubstr("handle")));
}

TEST_P(CudaOwned, WithoutADeviceItIsRefused) {
  EXPECT_EQ(Create(kGranule, "").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_P(CudaOwned, OnADeviceThatNoOperationUsesNothingIsMade) {
  SessionLimits limits;
  limits.owned_device_uuid = kFakeDeviceUuid;
  const auto sessions = Sessions(limits);
  const auto session = sessions->OpenSession(testing::ArgsOf('a'));
  ASSERT_TRUE(session.ok());
  const auto allocate = [&](const std::string& uuid) {
    return sessions->AllocateRegion(session->session_id, "out", GetParam(), kGranule, uuid)
        .status();
  };
  const absl::Status status = allocate(kSecondFakeDeviceUuid);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr(kSecondFakeDeviceUuid));
  EXPECT_THAT(std::string(status.message()),
              HasSubstr(std::string("use device \"") + kFakeDeviceUuid));
  EXPECT_EQ(RetainedContexts(1), 0);
  EXPECT_EQ(sessions->Counts().regions[0].owned_bytes, 0u);
  EXPECT_TRUE(allocate(kFakeDeviceUuid).ok());
}

TEST_P(CudaOwned, TheDeviceOfOperationsMayBeNamedAsTheToolsNameAnInstance) {
  SessionLimits limits;
  limits.owned_device_uuid = kFakeDeviceUuid;
  const auto sessions = Sessions(limits);
  const auto session = sessions->OpenSession(testing::ArgsOf('a'));
  ASSERT_TRUE(session.ok());
  const std::string instance = "MIG-" + std::string(kFakeDeviceUuid).substr(4);
  EXPECT_TRUE(
      sessions->AllocateRegion(session->session_id, "out", GetParam(), kGranule, instance).ok());
}

TEST_P(CudaOwned, MemoryIsQuarantinedUntilTheWorkersWord) {
  const auto sessions = Sessions({});
  const auto session = sessions->OpenSession(testing::ArgsOf('a'));
  ASSERT_TRUE(session.ok());
  const auto region = sessions->AllocateRegion(session->session_id, "out", GetParam(), kGranule + 1,
                                               kFakeDeviceUuid);
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ(region->info.owned_bytes, 2 * kGranule);
  EXPECT_EQ(region->ipc_handle.empty(), !IsIpc());
  EXPECT_EQ(region->fd_token == 0, IsIpc());
  ASSERT_TRUE(sessions->CloseSession(session->session_id).ok());
  sessions->SweepQuarantine();
  EXPECT_EQ(DriverMappings(), 1);
  EXPECT_EQ(sessions->Counts().regions[0].quarantined_bytes, 2 * kGranule);
  EXPECT_TRUE(
      sessions->RetireRegion(session->session_id, region->info.region_id, absl::ZeroDuration())
          .ok());
  EXPECT_EQ(DriverMappings(), 0);
}

INSTANTIATE_TEST_SUITE_P(EveryKind, CudaOwned, ::testing::Values("cuda_ipc", "cuda_vmm"),
                         [](const auto& info) {
                           return std::string(info.param) == "cuda_ipc" ? "ByIpc" : "ByDescriptor";
                         });

TEST_F(CudaOwnedByIpc, MemoryInABlockWithOthersIsNotShared) {
  ::setenv("KEEPSET_FAKE_SHARED_BLOCK", "1", 1);
  const absl::Status status = Create(kGranule).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("1048576 beyond a multiple of 2097152"));
  EXPECT_EQ(DriverMappings(), 0);
}

TEST_F(CudaOwnedByDescriptor, ADeviceOfLargerPiecesNamesThem) {
  ::setenv("KEEPSET_FAKE_GRANULARITY", "16777216", 1);
  const absl::Status status = Create(kGranule).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("in pieces of 16777216 bytes"));
}

TEST_F(CudaOwnedByDescriptor, TheSizeOfPiecesIsAskedOnceOfEachDevice) {
  const int before = CallFake("fake_cuda_granularity_questions");
  for (const char* const uuid : {kFakeDeviceUuid, kFakeDeviceUuid, kSecondFakeDeviceUuid}) {
    EXPECT_TRUE(Create(kGranule, uuid).ok());
  }
  EXPECT_EQ(CallFake("fake_cuda_granularity_questions") - before, 2);
}

}  // namespace
}  // namespace keepset::service
