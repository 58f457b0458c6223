// Device memory of another process, over a driver of host memory (tests/fakes/fake_libcuda.cc).
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "base/cuda_abi.h"
#include "service/memory/cuda_transports.h"
#include "service/memory/ipc_allocations.h"
#include "service/memory/seen_generations.h"
#include "service/memory/session_manager.h"
#include "tests/fakes/device_exporter.h"
#include "tests/service/memory/cuda_test_support.h"
#include "tests/service/memory/memory_test_support.h"

namespace keepset::service {
namespace {

using fakes::DeviceExporter;
using fakes::DeviceMemory;
using ::testing::HasSubstr;

constexpr uint64_t kBytes = kDeviceBytes;
constexpr cuda_abi::Result kLaunchFailure = 719;

class CudaIpcTransportTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<MappedRegion>> Open(RegionDescriptor descriptor) {
    return transport_->Open(std::move(descriptor));
  }
  absl::Status Refusal(RegionDescriptor descriptor) {
    const absl::Status status = Open(std::move(descriptor)).status();
    EXPECT_EQ(DriverMappings(), 0) << "a refused region left a mapping";
    return status;
  }

  const std::unique_ptr<MemoryTransport> transport_ =
      NewCudaIpcTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA));
  DeviceExporter exporter_{KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kBytes};
};

TEST_F(CudaIpcTransportTest, RegionIsAPieceOfTheWholeAllocation) {
  const auto region = Open(IpcRegion(exporter_, 4096, 1000));
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ((*region)->size_bytes(), 1000);
  EXPECT_EQ((*region)->space(), MemorySpace::kDevice);
  EXPECT_TRUE(HoldsPattern(**region, 4096));
}

TEST_F(CudaIpcTransportTest, RegionsOfOneAllocationShareOneMapping) {
  auto first = Open(IpcRegion(exporter_, 0, 64));
  auto second = Open(IpcRegion(exporter_, 4096, 64));
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(DriverMappings(), 1);
  first->reset();
  EXPECT_TRUE(HoldsPattern(**second, 4096));
  second->reset();
  EXPECT_EQ(DriverMappings(), 0);
}

TEST_F(CudaIpcTransportTest, WholeAllocationsCountAsDeviceMemoryOnce) {
  EXPECT_EQ(transport_->DeviceBytes(), 0);
  {
    const auto first = Open(IpcRegion(exporter_, 0, 64));
    const auto second = Open(IpcRegion(exporter_, 4096, 64));
    ASSERT_TRUE(first.ok() && second.ok());
    EXPECT_EQ(transport_->DeviceBytes(), kBytes);
  }
  EXPECT_EQ(transport_->DeviceBytes(), 0);
}

TEST_F(CudaIpcTransportTest, AllocationIsMappedAgainAfterItsLastUser) {
  { const auto first = Open(IpcRegion(exporter_, 0, 64)); }
  const auto again = Open(IpcRegion(exporter_, 0, 64));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(HoldsPattern(**again, 0));
}

TEST_F(CudaIpcTransportTest, WrongAllocationSizeNamesTheDrivers) {
  RegionDescriptor descriptor = IpcRegion(exporter_, 0, 64);
  descriptor.allocation_bytes = kBytes / 2;
  const absl::Status status = Refusal(std::move(descriptor));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("the driver says 2097152"));
}

TEST_F(CudaIpcTransportTest, FreedMemoryIsRefused) {
  exporter_.FreeMemory();
  EXPECT_EQ(Refusal(IpcRegion(exporter_, 0, 64)).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(CudaIpcTransportTest, HandleOfADeadExporterIsRefused) {
  exporter_.Kill();
  EXPECT_EQ(Refusal(IpcRegion(exporter_, 0, 64)).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(CudaIpcTransportTest, MappingOfAnExporterThatDiedIsStillGivenBack) {
  auto region = Open(IpcRegion(exporter_, 0, 64));
  ASSERT_TRUE(region.ok());
  exporter_.Kill();
  region->reset();
  EXPECT_EQ(DriverMappings(), 0);
}

TEST_F(CudaIpcTransportTest, EqualProcessIdsAreExplained) {
  RegionDescriptor descriptor = IpcRegion(exporter_, 0, 64);
  const int64_t own = ::getpid();
  std::memcpy(descriptor.ipc_handle.data(), &own, sizeof(own));
  const absl::Status status = Refusal(std::move(descriptor));
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("same process id"));
  EXPECT_THAT(status.message(), HasSubstr("cuda_vmm"));
}

TEST_F(CudaIpcTransportTest, UnknownDeviceDoesNotFit) {
  RegionDescriptor descriptor = IpcRegion(exporter_, 0, 64);
  descriptor.device_uuid = "GPU-ffffffff-0000-0000-0000-000000000000";
  const absl::Status status = Refusal(std::move(descriptor));
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr(fakes::kFakeDeviceUuid));
}

TEST_F(CudaIpcTransportTest, AnUnknownDevicesNameIsQuotedInPart) {
  RegionDescriptor descriptor = IpcRegion(exporter_, 0, 64);
  descriptor.device_uuid = "\xff" + std::string(1000, 'x');
  const absl::Status status = Refusal(std::move(descriptor));
  EXPECT_THAT(status.message(), HasSubstr("device_uuid \"\\xff" + std::string(63, 'x') + "\""));
}

TEST_F(CudaIpcTransportTest, DeviceIsKnownByTheNameOfAMigInstance) {
  RegionDescriptor descriptor = IpcRegion(exporter_, 0, 64);
  descriptor.device_uuid.replace(0, 3, "MIG");
  const auto region = Open(std::move(descriptor));
  EXPECT_TRUE(region.ok()) << region.status();
}

TEST_F(CudaIpcTransportTest, DeviceMustBeNamed) {
  RegionDescriptor descriptor = IpcRegion(exporter_, 0, 64);
  descriptor.device_uuid.clear();
  EXPECT_EQ(Refusal(std::move(descriptor)).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(CudaIpcTransportTest, ExtentsOutsideTheAllocationAreRefused) {
  constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();
  const std::pair<uint64_t, uint64_t> extents[] = {
      {0, 0}, {0, kBytes + 1}, {kBytes, 16}, {kHuge - 15, 32}, {16, kHuge}};
  for (const auto& [offset, length] : extents) {
    EXPECT_EQ(Refusal(IpcRegion(exporter_, offset, length)).code(),
              absl::StatusCode::kInvalidArgument)
        << offset << " " << length;
  }
}

TEST_F(CudaIpcTransportTest, MisalignedOffsetNamesTheAlignment) {
  EXPECT_THAT(Refusal(IpcRegion(exporter_, 8, 64)).message(), HasSubstr("multiple of 16"));
}

TEST_F(CudaIpcTransportTest, HandleOfAnotherLengthIsRefused) {
  RegionDescriptor descriptor = IpcRegion(exporter_, 0, 64);
  descriptor.ipc_handle.resize(63);
  EXPECT_THAT(Refusal(std::move(descriptor)).message(), HasSubstr("63 bytes, want 64"));
}

TEST_F(CudaIpcTransportTest, AnotherGenerationWaitsForTheMappedOne) {
  const auto first = Open(IpcRegion(exporter_, 0, 64));
  ASSERT_TRUE(first.ok());
  RegionDescriptor descriptor = IpcRegion(exporter_, 0, 64);
  descriptor.generation = 2;
  const absl::Status status = Open(std::move(descriptor)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("still mapped"));
}

TEST_F(CudaIpcTransportTest, EarlierGenerationIsStale) {
  const auto seen = std::make_shared<SeenGenerations>();
  RegionDescriptor descriptor = IpcRegion(exporter_, 0, 64);
  descriptor.generation = 5;
  descriptor.seen_generations = seen;
  ASSERT_TRUE(Open(std::move(descriptor)).ok());
  RegionDescriptor earlier = IpcRegion(exporter_, 0, 64);
  earlier.seen_generations = seen;
  EXPECT_EQ(Refusal(std::move(earlier)).code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(CudaIpcTransportTest, MemoryOfAnotherDeviceNamesBoth) {
  const DeviceExporter second(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kBytes, 1);
  const absl::Status status = Refusal(IpcRegion(second, 0, 64));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr(absl::StrCat("device_uuid=\"", fakes::kFakeDeviceUuid)));
  EXPECT_THAT(status.message(),
              HasSubstr(absl::StrCat("is of device \"", fakes::kSecondFakeDeviceUuid)));
}

TEST_F(CudaIpcTransportTest, MappingOutlivesARegionThatNamesAnotherDevice) {
  const auto region = Open(IpcRegion(exporter_, 4096, 64));
  ASSERT_TRUE(region.ok()) << region.status();
  RegionDescriptor elsewhere = IpcRegion(exporter_, 0, 64);
  elsewhere.device_uuid = fakes::kSecondFakeDeviceUuid;
  EXPECT_EQ(Open(std::move(elsewhere)).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(DriverMappings(), 1);
  EXPECT_TRUE(HoldsPattern(**region, 4096));
}

TEST_F(CudaIpcTransportTest, EveryDeviceIsServed) {
  const DeviceExporter second(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kBytes, 1);
  RegionDescriptor descriptor = IpcRegion(second, 4096, 64);
  descriptor.device_uuid = fakes::kSecondFakeDeviceUuid;
  const auto region = Open(std::move(descriptor));
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_TRUE(HoldsPattern(**region, 4096));
}

TEST_F(CudaIpcTransportTest, DeviceThatNoRegionNamesHasNoContext) {
  const auto region = Open(IpcRegion(exporter_, 0, 64));
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ(RetainedContexts(0), 1);
  EXPECT_EQ(RetainedContexts(1), 0);
}

TEST_F(CudaIpcTransportTest, OneContextServesEveryRegionOfItsDevice) {
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Open(IpcRegion(exporter_, 0, 64)).ok());
  EXPECT_EQ(RetainedContexts(0), 1);
}

TEST_F(CudaIpcTransportTest, RefusalsOfTheHostsSetupSayWhatToChange) {
  struct Case {
    cuda_abi::Result result;
    absl::StatusCode code;
    absl::string_view fix;
  };
  const Case cases[] = {
      {cuda_abi::kInvalidDevice, absl::StatusCode::kFailedPrecondition, "CUDA_VISIBLE_DEVICES"},
      {cuda_abi::kAlreadyMapped, absl::StatusCode::kFailedPrecondition, "retire it"},
      {cuda_abi::kMapFailed, absl::StatusCode::kFailedPrecondition, "cannot be mapped"},
      {cuda_abi::kUnknown, absl::StatusCode::kInvalidArgument, "a process that has ended"},
      {kLaunchFailure, absl::StatusCode::kInternal, "cuIpcOpenMemHandle"},
      {cuda_abi::kTooManyPeers, absl::StatusCode::kResourceExhausted, "name the device"},
      {cuda_abi::kPeerAccessUnsupported, absl::StatusCode::kFailedPrecondition, "name the device"},
      {cuda_abi::kOperatingSystem, absl::StatusCode::kFailedPrecondition, "IPC namespace"},
      {cuda_abi::kNotPermitted, absl::StatusCode::kFailedPrecondition, "same user"},
      {cuda_abi::kDeviceUnavailable, absl::StatusCode::kFailedPrecondition, "compute mode"},
      {cuda_abi::kSystemNotReady, absl::StatusCode::kUnavailable, "fabric manager"},
      {cuda_abi::kSystemDriverMismatch, absl::StatusCode::kFailedPrecondition, "same version"},
      {cuda_abi::kMpsServerNotReady, absl::StatusCode::kUnavailable, "MPS server"},
      {cuda_abi::kMpsMaxClientsReached, absl::StatusCode::kResourceExhausted, "MPS server"},
  };
  for (const Case& one : cases) {
    ::setenv("KEEPSET_FAKE_IPC_ERROR", absl::StrCat(one.result).c_str(), 1);
    const absl::Status status = Refusal(IpcRegion(exporter_, 0, 64));
    EXPECT_EQ(status.code(), one.code) << one.result;
    EXPECT_THAT(status.message(), HasSubstr(one.fix)) << one.result;
    EXPECT_THAT(status.message(), HasSubstr(absl::StrCat(one.result)));
  }
  ::unsetenv("KEEPSET_FAKE_IPC_ERROR");
}

TEST_F(CudaIpcTransportTest, EveryCallLeavesTheThreadWithoutAContext) {
  { const auto region = Open(IpcRegion(exporter_, 0, 64)); }
  EXPECT_EQ(CallFake("fake_cuda_context_depth"), 0);
}

TEST(CudaDriverTest, HostWithoutADriverSaysSo) {
  const absl::Status status = CudaDriver::Load("libcuda-that-is-not-there.so").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(status.message(), HasSubstr("no CUDA driver"));
}

TEST(CudaDriverTest, LibraryWithoutTheEntryPointsIsTooOld) {
  const absl::Status status = CudaDriver::Load("libm.so.6").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("too old"));
}

TEST(CudaDriverTest, DevicesHaveTheirUuidAsToolsPrintIt) {
  const auto driver = CudaDriver::Load(KEEPSET_FAKE_LIBCUDA);
  ASSERT_TRUE(driver.ok()) << driver.status();
  ASSERT_EQ((*driver)->devices().size(), 2u);
  EXPECT_EQ((*driver)->devices()[0].uuid, fakes::kFakeDeviceUuid);
  EXPECT_EQ((*driver)->devices()[1].uuid, fakes::kSecondFakeDeviceUuid);
}

}  // namespace
}  // namespace keepset::service
