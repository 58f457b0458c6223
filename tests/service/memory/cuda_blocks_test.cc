// Plain device memory whose handle shares the whole block it was made in, over a driver of host
// memory that does so in either way (tests/fakes/fake_libcuda.cc, KEEPSET_FAKE_BLOCKS).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "service/memory/cuda_transports.h"
#include "tests/fakes/device_exporter.h"
#include "tests/service/memory/cuda_test_support.h"

namespace keepset::service {
namespace {

using fakes::DeviceExporter;
using fakes::DeviceMemory;
using ::testing::HasSubstr;

constexpr uint64_t kMib = uint64_t{1} << 20;
constexpr uint64_t kOddBytes = 3 * kMib + 512;

// By how the driver answers a block.
class CudaIpcBlocks : public ::testing::TestWithParam<const char*> {
 protected:
  CudaIpcBlocks() { ::setenv("KEEPSET_FAKE_BLOCKS", GetParam(), 1); }
  ~CudaIpcBlocks() override { ::unsetenv("KEEPSET_FAKE_BLOCKS"); }

  absl::StatusOr<std::unique_ptr<MappedRegion>> Open(const DeviceExporter& exporter,
                                                     uint64_t announced) {
    RegionDescriptor descriptor = IpcRegion(exporter, 256, 64);
    descriptor.allocation_bytes = announced;
    return transport_->Open(std::move(descriptor));
  }

  const std::unique_ptr<MemoryTransport> transport_ =
      NewCudaIpcTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA));
};

TEST_P(CudaIpcBlocks, AnAllocationOfMoreThanABlockIsServedWithItsOwnSize) {
  const DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kOddBytes);
  {
    const auto region = Open(exporter, kOddBytes);
    ASSERT_TRUE(region.ok()) << region.status();
    EXPECT_TRUE(HoldsPattern(**region, 256));
    EXPECT_EQ(transport_->DeviceBytes(), 4 * kMib);
  }
  EXPECT_EQ(DriverMappings(), 0);
}

TEST_P(CudaIpcBlocks, AnotherNumberOfBlocksIsRefused) {
  const DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kOddBytes);
  for (const uint64_t announced : {2 * kMib, 4 * kMib + 1, 8 * kMib, UINT64_MAX}) {
    const absl::Status status = Open(exporter, announced).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << announced;
    EXPECT_THAT(status.message(), HasSubstr("the driver says 4194304")) << announced;
    EXPECT_EQ(DriverMappings(), 0) << announced;
  }
}

TEST_P(CudaIpcBlocks, ASmallAllocationIsRefusedForItsNeighbours) {
  for (const uint64_t bytes : {uint64_t{4096}, kMib + 512}) {
    const DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, bytes);
    const absl::Status status = Open(exporter, bytes).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bytes;
    EXPECT_THAT(status.message(), HasSubstr("neighbours")) << bytes;
    EXPECT_THAT(status.message(), HasSubstr("at least 2097152 bytes")) << bytes;
    EXPECT_EQ(DriverMappings(), 0) << bytes;
  }
}

INSTANTIATE_TEST_SUITE_P(EveryAnswer, CudaIpcBlocks, ::testing::Values("base", "inside"),
                         [](const auto& info) { return std::string(info.param); });

// A driver that knows the allocation in the block shows nothing of its neighbours' size.
TEST(CudaIpcAllocation, OfAnySizeIsServedWhereTheDriverMapsItAlone) {
  const auto transport = NewCudaIpcTransport(LoadOnce(KEEPSET_FAKE_LIBCUDA));
  const DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, 4096);
  RegionDescriptor descriptor = IpcRegion(exporter, 256, 64);
  descriptor.allocation_bytes = 4096;
  const auto region = transport->Open(std::move(descriptor));
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_TRUE(HoldsPattern(**region, 256));
}

}  // namespace
}  // namespace keepset::service
