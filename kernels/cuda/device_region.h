// Device memory of a size that is fixed when the backend is made: the caller's, or allocated then.
#ifndef KEEPSET_KERNELS_CUDA_DEVICE_REGION_H_
#define KEEPSET_KERNELS_CUDA_DEVICE_REGION_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/backend_registry.h"
#include "kernels/compute_backend.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/region_pieces.h"

namespace keepset::kernels::cuda {

// Less serves no operation.
constexpr int64_t kLeastDeviceMemoryBytes = int64_t{512} << 10;

// What is wrong with device_memory and device_memory_bytes on any host: InvalidArgument.
// extra_bytes: what every operation of these options needs beside the least.
absl::Status CheckDeviceMemory(const BackendOptions& options, int64_t extra_bytes);

// Thread-safe.
class DeviceRegion {
 public:
  // `device` is current; options are checked and ask for fixed memory. InvalidArgument for memory
  // that is none of the device's; ResourceExhausted when the device has not so much. `health` must
  // outlive it.
  static absl::StatusOr<std::unique_ptr<DeviceRegion>> New(const BackendOptions& options,
                                                           int device, DeviceHealth& health);
  // Of more bytes than any device has, none of which is there.
  static std::unique_ptr<DeviceRegion> NewOfNoMemory(DeviceHealth& health);
  DeviceRegion(const DeviceRegion&) = delete;
  DeviceRegion& operator=(const DeviceRegion&) = delete;
  ~DeviceRegion();

  // bytes >= 1 of any content, aligned to 256 bytes. ResourceExhausted names what there is.
  absl::StatusOr<std::byte*> Take(int64_t bytes);
  void Return(std::byte* data, int64_t bytes);

  DeviceMemoryUse use() const;

 private:
  enum class Owner { kUs, kCaller };

  DeviceRegion(std::byte* data, int64_t bytes, Owner owner, DeviceHealth& health);

  std::byte* const data_;
  const Owner owner_;
  DeviceHealth& health_;
  mutable absl::Mutex mutex_;
  RegionPieces pieces_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_DEVICE_REGION_H_
