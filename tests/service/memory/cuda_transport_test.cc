// Device memory of another process, over a driver of host memory (tests/fakes/fake_libcuda.cc).
#include <dlfcn.h>
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
#include "tests/service/memory/memory_test_support.h"

namespace keepset::service {
namespace {

using fakes::DeviceExporter;
using fakes::DeviceMemory;
using ::testing::HasSubstr;

constexpr uint64_t kBytes = 2 << 20;

int CallFake(const char* symbol) {
  void* const library = ::dlopen(KEEPSET_FAKE_LIBCUDA, RTLD_NOW);
  return reinterpret_cast<int (*)()>(::dlsym(library, symbol))();
}
// Mappings the driver holds in this process.
int DriverMappings() { return CallFake("fake_cuda_mappings"); }
// Primary contexts it holds there of the device of this ordinal.
int RetainedContexts(int device) {
  void* const library = ::dlopen(KEEPSET_FAKE_LIBCUDA, RTLD_NOW);
  return reinterpret_cast<int (*)(int)>(::dlsym(library, "fake_cuda_retains"))(device);
}

RegionDescriptor IpcRegion(const DeviceExporter& exporter, uint64_t offset, uint64_t length) {
  RegionDescriptor descriptor;
  descriptor.kind = "cuda_ipc";
  descriptor.ipc_handle = exporter.ipc_handle();
  descriptor.allocation_bytes = kBytes;
  descriptor.offset = offset;
  descriptor.length = length;
  descriptor.device_uuid = fakes::kFakeDeviceUuid;
  descriptor.generation = 1;
  return descriptor;
}

bool HoldsPattern(const MappedRegion& region, uint64_t offset) {
  for (int64_t i = 0; i < region.size_bytes(); ++i) {
    if (region.data()[i] != std::byte((offset + i) % 251)) return false;
  }
  return true;
}

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

// A driver that calls its device so, or has it shared by MPS.
class SharedDevice : public ::testing::Test {
 protected:
  ~SharedDevice() override {
    ::unsetenv("KEEPSET_FAKE_DEVICE_NAME");
    for (const char* const name :
         {"KEEPSET_FAKE_MPS", "KEEPSET_FAKE_NO_IPC", "KEEPSET_FAKE_NO_FD"}) {
      ::unsetenv(name);
    }
  }
  // What a handle of freed memory is refused with, and a device that is not there.
  static std::vector<absl::Status> Refusals() {
    const auto transport = NewCudaIpcTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA));
    DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kBytes);
    RegionDescriptor elsewhere = IpcRegion(exporter, 0, 64);
    elsewhere.device_uuid = "GPU-ffffffff-0000-0000-0000-000000000000";
    exporter.FreeMemory();
    return {transport->Open(IpcRegion(exporter, 0, 64)).status(),
            transport->Open(std::move(elsewhere)).status()};
  }
};

TEST_F(SharedDevice, RefusalOnAMigInstanceSaysThatItIsOne) {
  ::setenv("KEEPSET_FAKE_DEVICE_NAME", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", 1);
  for (const absl::Status& status : Refusals()) {
    EXPECT_FALSE(status.ok());
    EXPECT_THAT(status.message(), HasSubstr("MIG 1g.10gb\" is a MIG instance"));
    EXPECT_THAT(status.message(), HasSubstr("other GPU instances"));
  }
}

TEST_F(SharedDevice, RefusalUnderMpsSaysThatItIsUsed) {
  ::setenv("KEEPSET_FAKE_MPS", "1", 1);
  for (const absl::Status& status : Refusals()) {
    EXPECT_THAT(status.message(), HasSubstr("used through MPS"));
  }
}

TEST_F(SharedDevice, RefusalOfAWholeDeviceSaysNeither) {
  for (const absl::Status& status : Refusals()) {
    EXPECT_THAT(status.message(), ::testing::Not(HasSubstr("MIG")));
    EXPECT_THAT(status.message(), ::testing::Not(HasSubstr("MPS")));
  }
}

// The exporter's word is not needed: the handle is not opened at all.
TEST_F(SharedDevice, DeviceWithoutIpcRefusesBeforeAnythingIsOpened) {
  ::setenv("KEEPSET_FAKE_NO_IPC", "1", 1);
  const auto transport = NewCudaIpcTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA));
  const DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kBytes);
  const absl::Status status = transport->Open(IpcRegion(exporter, 0, 64)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(),
            absl::StrCat("device ", fakes::kFakeDeviceUuid,
                         " \"fake device\" cannot share memory this way: the driver supports no "
                         "CUDA IPC on it, want cuda_vmm, or memory of the host (memfd)"));
  EXPECT_EQ(RetainedContexts(0), 0);
}

TEST_F(SharedDevice, DeviceWithoutDescriptorsRefusesVmm) {
  ::setenv("KEEPSET_FAKE_NO_FD", "1", 1);
  const auto transport = NewCudaVmmTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA));
  const DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kVmm, kBytes);
  RegionDescriptor descriptor;
  descriptor.kind = "cuda_vmm";
  descriptor.fd.Reset(exporter.OpenFd());
  descriptor.allocation_bytes = kBytes;
  descriptor.length = 64;
  descriptor.device_uuid = fakes::kFakeDeviceUuid;
  const absl::Status status = transport->Open(std::move(descriptor)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(),
              HasSubstr("its memory is not shared by descriptors, want cuda_ipc"));
}

// What is not certain is left to the driver.
TEST_F(SharedDevice, MigInstanceAndMpsAreTriedWhereTheDeviceIsTheSame) {
  ::setenv("KEEPSET_FAKE_DEVICE_NAME", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", 1);
  ::setenv("KEEPSET_FAKE_MPS", "1", 1);
  const auto transport = NewCudaIpcTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA));
  const DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kBytes);
  const auto region = transport->Open(IpcRegion(exporter, 0, 64));
  EXPECT_TRUE(region.ok()) << region.status();
}

class CudaVmmTransportTest : public ::testing::Test {
 protected:
  RegionDescriptor Region(uint64_t allocation_bytes = kBytes) const {
    RegionDescriptor descriptor;
    descriptor.kind = "cuda_vmm";
    descriptor.fd.Reset(exporter_.OpenFd());
    descriptor.allocation_bytes = allocation_bytes;
    descriptor.offset = 32;
    descriptor.length = 1000;
    descriptor.device_uuid = fakes::kFakeDeviceUuid;
    return descriptor;
  }

  const std::unique_ptr<MemoryTransport> transport_ =
      NewCudaVmmTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA));
  const DeviceExporter exporter_{KEEPSET_FAKE_LIBCUDA, DeviceMemory::kVmm, kBytes};
};

TEST_F(CudaVmmTransportTest, RegionIsAPieceOfTheAllocation) {
  const auto region = transport_->Open(Region());
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_TRUE(HoldsPattern(**region, 32));
  EXPECT_EQ((*region)->space(), MemorySpace::kDevice);
}

TEST_F(CudaVmmTransportTest, ADriverWithoutReadOnlyMappingsIsServedToo) {
  ::setenv("KEEPSET_FAKE_NO_READ_ONLY", "1", 1);
  const auto region = transport_->Open(Region());
  ::unsetenv("KEEPSET_FAKE_NO_READ_ONLY");
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_TRUE(HoldsPattern(**region, 32));
}

TEST_F(CudaVmmTransportTest, MappingEndsWithTheRegion) {
  { const auto region = transport_->Open(Region()); }
  EXPECT_EQ(DriverMappings(), 0);
}

TEST_F(CudaVmmTransportTest, MoreThanTheAllocationIsRefusedAndLeavesNothing) {
  EXPECT_EQ(transport_->Open(Region(2 * kBytes)).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(DriverMappings(), 0);
}

TEST_F(CudaVmmTransportTest, DescriptorOfOtherMemoryIsRefused) {
  RegionDescriptor descriptor = Region();
  descriptor.fd = testing::NewMemfd("ordinary", kBytes);
  EXPECT_EQ(transport_->Open(std::move(descriptor)).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(CudaVmmTransport, MemoryOfAnotherDeviceNamesBothAndLeavesNothing) {
  const DeviceExporter second(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kVmm, kBytes, 1);
  RegionDescriptor descriptor;
  descriptor.kind = "cuda_vmm";
  descriptor.fd.Reset(second.OpenFd());
  descriptor.allocation_bytes = kBytes;
  descriptor.length = 64;
  descriptor.device_uuid = fakes::kFakeDeviceUuid;
  const absl::Status status =
      NewCudaVmmTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA))->Open(std::move(descriptor)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(),
              HasSubstr(absl::StrCat("is of device \"", fakes::kSecondFakeDeviceUuid)));
  EXPECT_EQ(DriverMappings(), 0);
}

TEST(DeviceRegions, EndOfTheSessionGivesTheMappingBackAfterTheLastLease) {
  const DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kBytes);
  std::vector<std::unique_ptr<MemoryTransport>> transports;
  transports.push_back(NewCudaIpcTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA)));
  const auto sessions = SessionManager::New({}, std::move(transports), SystemClock(), nullptr);
  OpenSessionArgs opening;
  opening.client_uuid = std::string(16, 'u');
  const auto session = sessions->OpenSession(opening);
  ASSERT_TRUE(session.ok()) << session.status();
  const auto region =
      sessions->RegisterRegion(session->session_id, "kv", 0, IpcRegion(exporter, 0, kBytes));
  ASSERT_TRUE(region.ok()) << region.status();
  {
    const auto lease = sessions->Lease(session->session_id, region->region_id);
    ASSERT_TRUE(lease.ok()) << lease.status();
    ASSERT_TRUE(sessions->CloseSession(session->session_id).ok());
    EXPECT_EQ(DriverMappings(), 1);
  }
  EXPECT_EQ(DriverMappings(), 0);
}

// A worker that was restarted in its container counts its allocations from the beginning, and has
// the process id and the addresses of the one before.
TEST(DeviceRegions, GenerationsOfAnEndedSessionBindNobody) {
  const DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kBytes);
  std::vector<std::unique_ptr<MemoryTransport>> transports;
  transports.push_back(NewCudaIpcTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA)));
  const auto sessions = SessionManager::New({}, std::move(transports), SystemClock(), nullptr);
  const auto register_as = [&](char client, uint64_t generation) {
    OpenSessionArgs opening;
    opening.client_uuid = std::string(16, client);
    const auto session = sessions->OpenSession(opening);
    RegionDescriptor descriptor = IpcRegion(exporter, 0, 64);
    descriptor.generation = generation;
    const absl::Status status =
        sessions->RegisterRegion(session->session_id, "kv", 0, std::move(descriptor)).status();
    EXPECT_TRUE(sessions->CloseSession(session->session_id).ok());
    return status;
  };
  EXPECT_EQ(register_as('a', 7), absl::OkStatus());
  EXPECT_EQ(register_as('b', 1), absl::OkStatus());
}

// Every way to get a region of device memory wrong, one after the other in one session, which works
// as before afterwards.
TEST(DeviceRegions, RefusedOnesLeaveTheSessionAsItWas) {
  constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();
  const DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kBytes);
  DeviceExporter freed(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kBytes);
  std::vector<std::unique_ptr<MemoryTransport>> transports;
  transports.push_back(NewCudaIpcTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA)));
  const auto sessions = SessionManager::New({}, std::move(transports), SystemClock(), nullptr);
  OpenSessionArgs opening;
  opening.client_uuid = std::string(16, 'u');
  const auto session = sessions->OpenSession(opening);
  ASSERT_TRUE(session.ok()) << session.status();
  const auto register_region = [&](const std::string& name, RegionDescriptor descriptor) {
    return sessions->RegisterRegion(session->session_id, name, 0, std::move(descriptor));
  };
  RegionDescriptor later = IpcRegion(exporter, 0, 64);
  later.generation = 7;
  const auto first = register_region("first", std::move(later));
  ASSERT_TRUE(first.ok()) << first.status();

  using Spoil = void (*)(RegionDescriptor&);
  const std::pair<Spoil, absl::StatusCode> cases[] = {
      {[](RegionDescriptor& d) { d.device_uuid = "GPU-00000000-0000-0000-0000-000000000000"; },
       absl::StatusCode::kFailedPrecondition},
      {[](RegionDescriptor& d) {
         const int64_t own = ::getpid();
         std::memcpy(d.ipc_handle.data(), &own, sizeof(own));
       },
       absl::StatusCode::kFailedPrecondition},
      {[](RegionDescriptor& d) { d.allocation_bytes = kBytes / 2; },
       absl::StatusCode::kInvalidArgument},
      {[](RegionDescriptor& d) { d.offset = kBytes; }, absl::StatusCode::kInvalidArgument},
      {[](RegionDescriptor& d) { d.offset = kHuge - 15; }, absl::StatusCode::kInvalidArgument},
      {[](RegionDescriptor& d) { d.offset = 4; }, absl::StatusCode::kInvalidArgument},
      {[](RegionDescriptor& d) { d.kind = "cuda_fabric"; }, absl::StatusCode::kNotFound},
      {[](RegionDescriptor& d) { d.ipc_handle.clear(); }, absl::StatusCode::kInvalidArgument},
      {[](RegionDescriptor& d) { d.generation = 3; }, absl::StatusCode::kFailedPrecondition},
  };
  for (size_t i = 0; i < std::size(cases); ++i) {
    RegionDescriptor descriptor = IpcRegion(exporter, 0, 64);
    descriptor.generation = 7;
    cases[i].first(descriptor);
    EXPECT_EQ(register_region("bad", std::move(descriptor)).status().code(), cases[i].second)
        << "case " << i;
  }
  RegionDescriptor of_freed = IpcRegion(freed, 0, 64);
  freed.FreeMemory();
  EXPECT_EQ(register_region("bad", std::move(of_freed)).status().code(),
            absl::StatusCode::kInvalidArgument);

  RegionDescriptor good = IpcRegion(exporter, 4096, 64);
  good.generation = 7;
  const auto second = register_region("second", std::move(good));
  ASSERT_TRUE(second.ok()) << second.status();
  const auto lease = sessions->Lease(session->session_id, second->region_id);
  ASSERT_TRUE(lease.ok()) << lease.status();
  EXPECT_EQ(DriverMappings(), 1);
}

}  // namespace
}  // namespace keepset::service
