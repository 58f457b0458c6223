// What the driver and the transports over it make of device memory that is announced wrongly: a
// typed refusal each time, nothing stays mapped, and the session goes on.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <iterator>
#include <limits>
#include <memory>
#include <string>
#include <utility>

#include "clients/cpp/device_memory.h"
#include "service/memory/session_manager.h"
#include "tests/gpu/device_sessions_fixture.h"
#include "tests/gpu/ipc_driver.h"
#include "tests/gpu/ipc_process.h"
#include "tests/gpu/ipc_worker.h"

namespace keepset::gpu {
namespace {

using service::RegionDescriptor;

constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();

class RefusedDeviceMemory : public DeviceSessions {};

using Spoil = void (*)(RegionDescriptor&);
struct Case {
  const char* what;
  Spoil spoil;
  absl::StatusCode want;
};

TEST_F(RefusedDeviceMemory, HandlesThatAreWrong) {
  const auto exporter = NewWorker(kNoServer, kByIpc, "handle");
  const RegionDescriptor good = HandleOf(*exporter);
  const auto copy = [&good] {
    RegionDescriptor region;
    region.kind = good.kind;
    region.ipc_handle = good.ipc_handle;
    region.allocation_bytes = good.allocation_bytes;
    region.length = good.length;
    region.device_uuid = good.device_uuid;
    region.generation = good.generation;
    return region;
  };
  const Case cases[] = {
      {"another device",
       [](RegionDescriptor& r) { r.device_uuid = "GPU-00000000-0000-0000-0000-000000000000"; },
       absl::StatusCode::kFailedPrecondition},
      {"no device", [](RegionDescriptor& r) { r.device_uuid.clear(); },
       absl::StatusCode::kInvalidArgument},
      {"half the allocation", [](RegionDescriptor& r) { r.allocation_bytes /= 2; },
       absl::StatusCode::kInvalidArgument},
      {"twice the allocation", [](RegionDescriptor& r) { r.allocation_bytes *= 2; },
       absl::StatusCode::kInvalidArgument},
      {"past the end", [](RegionDescriptor& r) { r.offset = r.allocation_bytes; },
       absl::StatusCode::kInvalidArgument},
      {"overflow", [](RegionDescriptor& r) { r.offset = kHuge - 15; },
       absl::StatusCode::kInvalidArgument},
      {"misaligned", [](RegionDescriptor& r) { r.offset = 4; }, absl::StatusCode::kInvalidArgument},
      {"no length", [](RegionDescriptor& r) { r.length = 0; }, absl::StatusCode::kInvalidArgument},
      {"another kind", [](RegionDescriptor& r) { r.kind = "cuda_fabric"; },
       absl::StatusCode::kNotFound},
      {"no handle", [](RegionDescriptor& r) { r.ipc_handle.clear(); },
       absl::StatusCode::kInvalidArgument},
      {"half a handle", [](RegionDescriptor& r) { r.ipc_handle.resize(32); },
       absl::StatusCode::kInvalidArgument},
  };
  for (const Case& one : cases) {
    RegionDescriptor region = copy();
    one.spoil(region);
    const absl::Status status = Register("bad", std::move(region));
    EXPECT_EQ(status.code(), one.want) << one.what << ": " << status;
    EXPECT_EQ(MappedBytes(), 0u) << one.what;
  }
  absl::Status status = Register("good", copy());
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(MappedBytes(), static_cast<uint64_t>(kRegionBytes));
  RegionDescriptor reused = copy();
  ++reused.generation;
  status = Register("reused", std::move(reused));
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
}

TEST_F(RefusedDeviceMemory, HandleOfThisProcess) {
  std::byte* const memory = driver_.Allocate(kByIpc, kRegionBytes);
  ASSERT_NE(memory, nullptr);
  {
    const auto exported = client::DeviceRegion::Export(memory, kRegionBytes);
    ASSERT_TRUE(exported.ok()) << exported.status();
    const absl::Status status = Register("own", DescriptorOf(**exported));
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_NE(status.message().find("same process id"), std::string::npos) << status;
  }
  EXPECT_TRUE(driver_.Free(memory));
}

TEST_F(RefusedDeviceMemory, HandleOfFreedMemory) {
  const auto exporter = NewWorker(kNoServer, kByIpc, "freed_handle");
  ExpectDriverRefusal("freed memory", Register("freed", HandleOf(*exporter)));
}

TEST_F(RefusedDeviceMemory, HandleOfADeadProcess) {
  const auto exporter = NewWorker(kNoServer, kByIpc, "handle");
  RegionDescriptor region = HandleOf(*exporter);
  exporter->Kill();
  ExpectDriverRefusal("dead process", Register("dead", std::move(region)));
}

TEST_F(RefusedDeviceMemory, MemoryOfAnExporterThatDiedIsBackWhenItsSessionEnds) {
  const int64_t before = driver_.FreeBytes();
  const auto exporter = NewWorker(kNoServer, kByIpc, "handle");
  const absl::Status status = Register("kv", HandleOf(*exporter));
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(IsTaken(driver_, before));
  exporter->Kill();
  EXPECT_TRUE(sessions_->CloseSession(session_).ok());
  EXPECT_EQ(MappedBytes(), 0u);
  EXPECT_TRUE(IsBack(driver_, before));
}

TEST_F(RefusedDeviceMemory, DescriptorsThatAreWrong) {
  std::byte* const memory = driver_.Allocate(kByVmm, kRegionBytes);
  ASSERT_NE(memory, nullptr);
  {
    const auto exported = client::DeviceRegion::Export(memory, kRegionBytes);
    ASSERT_TRUE(exported.ok()) << exported.status();
    ASSERT_EQ((*exported)->kind(), kByVmm);
    const int fd = (*exported)->fd();
    const service::UniqueFd ordinary(::memfd_create("ordinary", MFD_CLOEXEC));
    ASSERT_EQ(::ftruncate(ordinary.get(), kRegionBytes), 0);
    const service::UniqueFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
    const auto announced = [&](Spoil spoil, int passed) {
      RegionDescriptor region = DescriptorOf(**exported);
      spoil(region);
      const absl::Status status = Register("bad", std::move(region), passed);
      EXPECT_EQ(MappedBytes(), 0u) << status;
      return status;
    };
    const auto refused = [&](const char* what, Spoil spoil, int passed, absl::StatusCode want) {
      const absl::Status status = announced(spoil, passed);
      EXPECT_EQ(status.code(), want) << what << ": " << status;
    };
    constexpr Spoil kNothing = [](RegionDescriptor&) {};
    ExpectDriverRefusal("ordinary memory", announced(kNothing, ordinary.get()));
    ExpectDriverRefusal("no memory", announced(kNothing, null.get()));
    refused("no descriptor", kNothing, -1, absl::StatusCode::kInvalidArgument);
    ExpectDriverRefusal("twice the allocation",
                        announced([](RegionDescriptor& r) { r.allocation_bytes *= 2; }, fd));
    refused(
        "past the end", [](RegionDescriptor& r) { r.offset = r.allocation_bytes; }, fd,
        absl::StatusCode::kInvalidArgument);
    refused(
        "another device",
        [](RegionDescriptor& r) { r.device_uuid = "GPU-00000000-0000-0000-0000-000000000000"; }, fd,
        absl::StatusCode::kFailedPrecondition);
    const absl::Status status = Register("good", DescriptorOf(**exported), fd);
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_EQ(MappedBytes(), static_cast<uint64_t>(kRegionBytes));
    EXPECT_TRUE(sessions_->CloseSession(session_).ok());
  }
  EXPECT_TRUE(driver_.Free(memory));
}

}  // namespace
}  // namespace keepset::gpu
