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
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "base/clock.h"
#include "clients/cpp/device_memory.h"
#include "service/memory/session_manager.h"
#include "tests/gpu/ipc_driver.h"
#include "tests/gpu/ipc_process.h"
#include "tests/gpu/ipc_worker.h"
#include "tests/integration/child_process.h"

namespace keepset::gpu {
namespace {

using integration::ChildProcess;
using service::RegionDescriptor;

constexpr char kNoServer[] = "-";
constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();
constexpr uint64_t kPiece = uint64_t{1} << 20;

class RefusedDeviceMemory : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = driver_.Open(); !reason.empty()) GTEST_SKIP() << reason;
    sessions_ =
        service::SessionManager::New({}, service::NewBuiltinTransports([](absl::string_view kind) {
                                       return kind == kByIpc || kind == kByVmm;
                                     }),
                                     SystemClock(), nullptr);
    service::OpenSessionArgs opening;
    opening.client_uuid = std::string(16, 'u');
    const auto session = sessions_->OpenSession(opening);
    ASSERT_TRUE(session.ok()) << session.status();
    session_ = session->session_id;
  }

  // What a worker of its own process says of its memory.
  static RegionDescriptor HandleOf(ChildProcess& exporter) {
    const std::vector<std::string> words = absl::StrSplit(exporter.AwaitLine("handle "), ' ');
    RegionDescriptor region;
    if (words.size() != 5) {
      ADD_FAILURE() << "the exporter says nothing";
      return region;
    }
    region.kind = kByIpc;
    region.ipc_handle = absl::HexStringToBytes(words[1]);
    region.length = kPiece;
    region.device_uuid = words[3];
    EXPECT_TRUE(absl::SimpleAtoi(words[2], &region.allocation_bytes));
    EXPECT_TRUE(absl::SimpleAtoi(words[4], &region.generation));
    return region;
  }

  static RegionDescriptor DescriptorOf(const client::DeviceRegion& exported) {
    RegionDescriptor region;
    region.kind = exported.kind();
    region.ipc_handle = exported.ipc_handle();
    region.allocation_bytes = exported.allocation_bytes();
    region.length = kPiece;
    region.device_uuid = exported.device_uuid();
    region.generation = exported.generation();
    return region;
  }

  absl::Status Register(const std::string& name, RegionDescriptor region, int fd = -1) {
    uint64_t token = 0;
    if (fd >= 0) {
      const auto deposited = sessions_->DepositFd(session_, service::UniqueFd(::dup(fd)));
      if (!deposited.ok()) return deposited.status();
      token = *deposited;
    }
    return sessions_->RegisterRegion(session_, name, token, std::move(region)).status();
  }

  uint64_t MappedBytes() const {
    uint64_t bytes = 0;
    for (const auto& kind : sessions_->Counts().regions) bytes += kind.device_bytes;
    return bytes;
  }

  Driver driver_;
  std::unique_ptr<service::SessionManager> sessions_;
  std::string session_;
};

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
  const absl::Status status = Register("freed", HandleOf(*exporter));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
}

TEST_F(RefusedDeviceMemory, HandleOfADeadProcess) {
  const auto exporter = NewWorker(kNoServer, kByIpc, "handle");
  RegionDescriptor region = HandleOf(*exporter);
  exporter->Kill();
  const absl::Status status = Register("dead", std::move(region));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
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
    const auto refused = [&](const char* what, Spoil spoil, int passed, absl::StatusCode want) {
      RegionDescriptor region = DescriptorOf(**exported);
      spoil(region);
      const absl::Status status = Register("bad", std::move(region), passed);
      EXPECT_EQ(status.code(), want) << what << ": " << status;
      EXPECT_EQ(MappedBytes(), 0u) << what;
    };
    constexpr Spoil kNothing = [](RegionDescriptor&) {};
    refused("ordinary memory", kNothing, ordinary.get(), absl::StatusCode::kInvalidArgument);
    refused("no memory", kNothing, null.get(), absl::StatusCode::kInvalidArgument);
    refused("no descriptor", kNothing, -1, absl::StatusCode::kInvalidArgument);
    refused(
        "twice the allocation", [](RegionDescriptor& r) { r.allocation_bytes *= 2; }, fd,
        absl::StatusCode::kInvalidArgument);
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
