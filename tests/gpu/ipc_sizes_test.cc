// Plain allocations that are no whole blocks of the driver: what a worker announces of one is
// refused with a typed error, or is the memory the worker means. Which of the two the driver makes
// of small ones is printed.
#include <gtest/gtest.h>

#include <cstdint>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/cuda_abi.h"
#include "tests/gpu/device_sessions_fixture.h"
#include "tests/gpu/ipc_driver.h"
#include "tests/gpu/ipc_process.h"
#include "tests/gpu/ipc_worker.h"

namespace keepset::gpu {
namespace {

constexpr int64_t kKib = 1 << 10;
constexpr int64_t kMib = 1 << 20;

// By the size of both allocations.
class OddDeviceMemory : public DeviceSessions, public ::testing::WithParamInterface<int64_t> {};

TEST_P(OddDeviceMemory, IsRefusedOrIsTheMemoryThatIsMeant) {
  const bool is_small = static_cast<uint64_t>(GetParam()) < cuda_abi::kAllocationGranularity;
  const auto exporter = NewWorker(kNoServer, kByIpc, absl::StrCat("sized_", GetParam()));
  const std::string exported = exporter->AwaitLine("e");
  EXPECT_TRUE(absl::StrContains(exported, is_small ? "neighbours" : "exported")) << exported;
  for (int i = 0; i < 2; ++i) {
    service::RegionDescriptor region = HandleOf(*exporter);
    region.length = kSizedBytes;
    const std::string name = absl::StrCat("sized-", i);
    const absl::Status status = Register(name, std::move(region));
    if (is_small && !status.ok()) {
      ExpectDriverRefusal(name.c_str(), status);
      continue;
    }
    ASSERT_TRUE(status.ok()) << status;
    const auto lease = sessions_->Lease(session_, region_id_);
    ASSERT_TRUE(lease.ok()) << lease.status();
    std::vector<unsigned char> found(kSizedBytes);
    ASSERT_TRUE(driver_.Read(found.data(), lease->region().data(), kSizedBytes));
    EXPECT_EQ(found, std::vector<unsigned char>(kSizedBytes, kSizedPattern + i));
    std::cout << name << ": " << GetParam() << " bytes, mapped " << MappedBytes() << std::endl;
  }
  EXPECT_TRUE(sessions_->CloseSession(session_).ok());
  EXPECT_EQ(MappedBytes(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Sizes, OddDeviceMemory,
                         ::testing::Values(4 * kKib, kMib + 512, 3 * kMib + 512),
                         [](const auto& info) { return absl::StrCat(info.param); });

}  // namespace
}  // namespace keepset::gpu
