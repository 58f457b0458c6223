// Device memory by descriptor, devices that are shared in special ways, and sessions with device
// regions, over a driver of host memory (tests/fakes/fake_libcuda.cc).
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

TEST_F(SharedDevice, WhatADriverSharesIsKnownWithoutAContext) {
  ::setenv("KEEPSET_FAKE_NO_IPC", "1", 1);
  const CudaDriverSource driver = LoadOnce(KEEPSET_FAKE_LIBCUDA);
  const std::vector<DeviceSupport> ipc = NewCudaIpcTransport(driver)->DevicesSupported();
  const std::vector<DeviceSupport> vmm = NewCudaVmmTransport(driver)->DevicesSupported();
  ASSERT_EQ(ipc.size(), 2u);
  ASSERT_EQ(vmm.size(), 2u);
  EXPECT_EQ(ipc[0].uuid, fakes::kFakeDeviceUuid);
  EXPECT_EQ(ipc[0].obstacle, "the driver supports no CUDA IPC on it");
  EXPECT_EQ(vmm[0].uuid, fakes::kFakeDeviceUuid);
  EXPECT_EQ(vmm[0].obstacle, "");
  EXPECT_EQ(RetainedContexts(0), 0);
}

TEST_F(SharedDevice, HostWithoutADriverSharesNoDevice) {
  const CudaDriverSource none = LoadOnce("libnone.so");
  EXPECT_TRUE(NewCudaIpcTransport(none)->DevicesSupported().empty());
  EXPECT_TRUE(NewCudaVmmTransport(none)->DevicesSupported().empty());
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

std::unique_ptr<SessionManager> SessionsWithIpc() {
  std::vector<std::unique_ptr<MemoryTransport>> transports;
  transports.push_back(NewCudaIpcTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA)));
  return SessionManager::New({}, std::move(transports), SystemClock(), nullptr);
}

TEST(DeviceRegions, EndOfTheSessionGivesTheMappingBackAfterTheLastLease) {
  const DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kBytes);
  const auto sessions = SessionsWithIpc();
  const auto session = sessions->OpenSession(testing::ArgsOf('u'));
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
  const auto sessions = SessionsWithIpc();
  const auto register_as = [&](char client, uint64_t generation) {
    const auto session = sessions->OpenSession(testing::ArgsOf(client));
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
  const auto sessions = SessionsWithIpc();
  const auto session = sessions->OpenSession(testing::ArgsOf('u'));
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
