// Exporting device memory, over a driver of host memory (tests/fakes/fake_libcuda.cc).
#include "clients/cpp/device_memory.h"

#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "base/cuda_abi.h"

namespace keepset::client {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kBytes = 2 << 20;

class DeviceMemoryTest : public ::testing::Test {
 protected:
  DeviceMemoryTest() {
    void* const library = ::dlopen(KEEPSET_FAKE_LIBCUDA, RTLD_NOW);
    const auto allocate = reinterpret_cast<int (*)(cuda_abi::DevicePointer*, size_t)>(
        ::dlsym(library, "cuMemAlloc_v2"));
    EXPECT_EQ(allocate(&pointer_, kBytes), cuda_abi::kSuccess);
  }

  void* At(int64_t offset) const { return reinterpret_cast<std::byte*>(pointer_) + offset; }
  absl::StatusOr<std::unique_ptr<DeviceRegion>> Export(void* data, int64_t bytes) const {
    return DeviceRegion::Export(data, bytes, KEEPSET_FAKE_LIBCUDA);
  }

  cuda_abi::DevicePointer pointer_ = 0;
};

TEST_F(DeviceMemoryTest, PlainAllocationIsSharedByIpcWithItsOffset) {
  const auto region = Export(At(4096), 1024);
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ((*region)->kind(), "cuda_ipc");
  EXPECT_EQ((*region)->ipc_handle().size(), 64u);
  EXPECT_EQ((*region)->offset(), 4096u);
  EXPECT_EQ((*region)->allocation_bytes(), static_cast<uint64_t>(kBytes));
  EXPECT_EQ((*region)->device_uuid(), "GPU-00112233-4455-6677-8899-aabbccddeeff");
  EXPECT_EQ((*region)->fd(), -1);
}

TEST_F(DeviceMemoryTest, ContainsOnlyWhatLiesInside) {
  const auto region = Export(At(64), 128);
  ASSERT_TRUE(region.ok());
  EXPECT_TRUE((*region)->Contains(At(64), 128));
  EXPECT_TRUE((*region)->Contains(At(191), 1));
  EXPECT_FALSE((*region)->Contains(At(63), 1));
  EXPECT_FALSE((*region)->Contains(At(65), 128));
}

TEST_F(DeviceMemoryTest, BytesBeyondTheAllocationNameTheFix) {
  const absl::Status status = Export(At(0), kBytes + 1).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("expandable_segments:False"));
}

TEST_F(DeviceMemoryTest, ASmallAllocationIsRefusedForItsNeighbours) {
  void* const library = ::dlopen(KEEPSET_FAKE_LIBCUDA, RTLD_NOW);
  const auto allocate = reinterpret_cast<int (*)(cuda_abi::DevicePointer*, size_t)>(
      ::dlsym(library, "cuMemAlloc_v2"));
  cuda_abi::DevicePointer small = 0;
  ASSERT_EQ(allocate(&small, kBytes - 1), cuda_abi::kSuccess);
  const absl::Status status = Export(reinterpret_cast<void*>(small), 64).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("neighbours"));
  EXPECT_THAT(status.message(), HasSubstr("at least 2097152 bytes"));
}

TEST_F(DeviceMemoryTest, HostMemoryIsRefused) {
  alignas(16) std::byte host[64];
  EXPECT_THAT(Export(host, 16).status().message(), HasSubstr("SharedRegion"));
}

TEST_F(DeviceMemoryTest, MisalignedPointerIsRefused) {
  EXPECT_THAT(Export(At(8), 16).status().message(), HasSubstr("multiple of 16"));
}

TEST_F(DeviceMemoryTest, NoBytesAreRefused) {
  EXPECT_EQ(Export(At(0), 0).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(DeviceMemoryTest, HostWithoutADriverSaysSo) {
  const absl::Status status =
      DeviceRegion::Export(At(0), 16, "libcuda-that-is-not-there.so").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(status.message(), HasSubstr("no CUDA driver"));
}

}  // namespace
}  // namespace keepset::client
