// What is refused of device memory of a fixed size.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "kernels/cuda/device_region.h"
#include "tests/kernels/cuda/cublas_fixture.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/emulated_runtime.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

namespace {

using ::testing::HasSubstr;

constexpr int64_t kLeastWithCublas = int64_t{4608} << 10;

std::string Text(const absl::Status& status) { return std::string(status.message()); }

BackendOptions Fixed(int64_t bytes) {
  BackendOptions options;
  options.device_memory_bytes = bytes;
  return options;
}

class DeviceMemoryOptions : public ::testing::Test {
 protected:
  static absl::Status Refusal(const BackendOptions& options) {
    return NewCudaBackend(options).status();
  }
  static absl::Status RefusalOf(void* memory, int64_t bytes) {
    BackendOptions options = Fixed(bytes);
    options.device_memory = memory;
    return Refusal(options);
  }
};

TEST_F(DeviceMemoryOptions, TooLittleIsRefused) {
  for (const int64_t bytes : {int64_t{-1}, int64_t{1}, cuda::kLeastDeviceMemoryBytes - 1}) {
    const absl::Status status = Refusal(Fixed(bytes));
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bytes;
    EXPECT_THAT(Text(status), HasSubstr("want 0 or 524288 or more"));
  }
}

TEST_F(DeviceMemoryOptions, CublasWantsRoomForItsProducts) {
  BackendOptions options = CublasOptions();
  options.device_memory_bytes = kLeastWithCublas - 1;
  const absl::Status status = Refusal(options);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Text(status), HasSubstr("device_memory_bytes=4718591, want 0 or 4718592 or more"));
  options.device_memory_bytes = kLeastWithCublas;
  EXPECT_TRUE(Refusal(options).ok());
}

TEST_F(DeviceMemoryOptions, MemoryThatIsNotTheDevicesIsRefused) {
  const DeviceBytes memory{std::vector<std::byte>(1 << 20)};
  alignas(256) static std::byte aligned[1 << 20];
  EXPECT_EQ(RefusalOf(memory.data(), 0).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Text(RefusalOf(memory.data() + 128, 1 << 19)), HasSubstr("a multiple of 256"));
  EXPECT_THAT(Text(RefusalOf(aligned, 1 << 20)),
              HasSubstr("want memory of cudaMalloc on device 0"));
  EXPECT_THAT(Text(RefusalOf(memory.data(), (1 << 20) + 4096)),
              HasSubstr("not memory of a device from its first to its last byte"));
  cuda::PlaceElsewhere(memory.data());
  EXPECT_THAT(Text(RefusalOf(memory.data(), 1 << 20)),
              HasSubstr("of device 1, want memory of device 0"));
  cuda::PlaceElsewhere(nullptr);
  EXPECT_TRUE(RefusalOf(memory.data(), 1 << 20).ok());
}

TEST_F(DeviceMemoryOptions, ADeviceWithoutSoMuchIsRefusedWithWhatItHas) {
  cuda::LimitEmulatedMemory(3 << 20);
  const absl::Status status = Refusal(Fixed(4 << 20));
  cuda::LimitEmulatedMemory(size_t{1} << 40);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Text(status), HasSubstr("device_memory_bytes=4194304: device 0 has 3145728 of "
                                      "6291456 bytes free, want a smaller size, or to start"));
}

}  // namespace
}  // namespace keepset::kernels
