#include "kernels/cuda/device_region.h"

#include <cuda_runtime_api.h>

#include <bit>
#include <cstdint>
#include <optional>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/piece_bounds.h"
#include "kernels/cuda/relaxed_capture.h"

namespace keepset::kernels::cuda {
namespace {

// The runtime does not say how far an allocation reaches; its first and its last byte tell whether
// they are the device's.
absl::Status CheckPlace(const std::byte* data, int device, DeviceHealth& health) {
  cudaPointerAttributes attributes = {};
  const cudaError_t error = cudaPointerGetAttributes(&attributes, data);
  if (error == cudaErrorInvalidValue) {
    cudaGetLastError();  // Memory that the driver does not know.
  } else {
    KEEPSET_RETURN_IF_ERROR(health.Check(error, "cudaPointerGetAttributes"));
  }
  if (error != cudaSuccess || attributes.type != cudaMemoryTypeDevice) {
    return absl::InvalidArgumentError(
        absl::StrCat("cuda: device_memory: not memory of a device from its first to its last byte, "
                     "want memory of cudaMalloc on device ",
                     device));
  }
  if (attributes.device == device) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "cuda: device_memory: of device ", attributes.device, ", want memory of device ", device));
}

}  // namespace

absl::Status CheckDeviceMemory(const BackendOptions& options, int64_t extra_bytes) {
  const int64_t bytes = options.device_memory_bytes;
  if (bytes == 0 && options.device_memory == nullptr) return absl::OkStatus();
  const int64_t least = kLeastDeviceMemoryBytes + extra_bytes;
  if (bytes < least) {
    return absl::InvalidArgumentError(absl::StrCat("cuda: device_memory_bytes=", bytes, ", want ",
                                                   options.device_memory == nullptr ? "0 or " : "",
                                                   least, " or more"));
  }
  if (reinterpret_cast<uintptr_t>(options.device_memory) % RegionPieces::kAlignment != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "cuda: device_memory: want an address that is a multiple of ", RegionPieces::kAlignment));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<DeviceRegion>> DeviceRegion::New(const BackendOptions& options,
                                                                int device, DeviceHealth& health) {
  const int64_t bytes = options.device_memory_bytes;
  if (options.device_memory != nullptr) {
    auto* const data = static_cast<std::byte*>(options.device_memory);
    KEEPSET_RETURN_IF_ERROR(CheckPlace(data, device, health));
    KEEPSET_RETURN_IF_ERROR(CheckPlace(data + bytes - 1, device, health));
    return absl::WrapUnique(new DeviceRegion(data, bytes, Owner::kCaller, health));
  }
  const RelaxedCapture capture(health);
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, static_cast<size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free_bytes = 0;
    size_t all_bytes = 0;
    KEEPSET_RETURN_IF_CUDA_ERROR(health, cudaMemGetInfo(&free_bytes, &all_bytes));
    return absl::ResourceExhaustedError(absl::StrCat(
        "cuda: device_memory_bytes=", bytes, ": device ", device, " has ", free_bytes, " of ",
        all_bytes, " bytes free, want a smaller size, or to start before what fills the device"));
  }
  KEEPSET_RETURN_IF_ERROR(health.Check(error, "cudaMalloc"));
  return absl::WrapUnique(
      new DeviceRegion(static_cast<std::byte*>(data), bytes, Owner::kUs, health));
}

std::unique_ptr<DeviceRegion> DeviceRegion::NewOfNoMemory(DeviceHealth& health) {
  constexpr int64_t kBytes = int64_t{1} << 46;
  // Not null, as much aligned as what cudaMalloc returns, and above what processes use.
  auto* const data = std::bit_cast<std::byte*>(uintptr_t{1} << 60);
  return absl::WrapUnique(new DeviceRegion(data, kBytes, Owner::kCaller, health));
}

DeviceRegion::DeviceRegion(std::byte* data, int64_t bytes, Owner owner, DeviceHealth& health)
    : data_(data), owner_(owner), health_(health), pieces_(bytes) {
  CloseBytes(data_, pieces_.bytes());
}

DeviceRegion::~DeviceRegion() {
  OpenBytes(data_, pieces_.bytes());
  if (owner_ == Owner::kCaller) return;
  const RelaxedCapture capture(health_);
  health_.Check(cudaFree(data_), "cudaFree").IgnoreError();
}

absl::StatusOr<std::byte*> DeviceRegion::Take(int64_t bytes) {
  const absl::MutexLock lock(&mutex_);
  const std::optional<int64_t> offset = pieces_.Take(bytes);
  if (offset.has_value()) {
    OpenBytes(data_ + *offset, bytes);
    return data_ + *offset;
  }
  return absl::ResourceExhaustedError(absl::StrCat(
      "cuda: ", bytes, " bytes of device memory do not fit: of device_memory_bytes=",
      pieces_.bytes(), " ", pieces_.free_bytes(), " are free, ", pieces_.largest_free(),
      " of them in one piece; want more, or fewer operations at a time"));
}

void DeviceRegion::Return(std::byte* data, int64_t bytes) {
  const absl::MutexLock lock(&mutex_);
  CloseBytes(data, bytes);
  pieces_.Return(data - data_, bytes);
}

DeviceMemoryUse DeviceRegion::use() const {
  const absl::MutexLock lock(&mutex_);
  return {pieces_.bytes(), pieces_.bytes() - pieces_.free_bytes(), pieces_.peak_end()};
}

}  // namespace keepset::kernels::cuda
