// The device that a thread's CUDA calls mean, set for a while: the thread may be an engine's, which
// goes on with the one it had. Nor do the calls concern a graph that the engine captures.
#ifndef KEEPSET_KERNELS_CUDA_CURRENT_DEVICE_H_
#define KEEPSET_KERNELS_CUDA_CURRENT_DEVICE_H_

#include <cuda_runtime_api.h>

#include <optional>
#include <utility>

#include "absl/status/statusor.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/relaxed_capture.h"

namespace keepset::kernels::cuda {

// Makes the device before it current again when it ends. Move-only; ends on the thread it began on.
class CurrentDevice {
 public:
  static absl::StatusOr<CurrentDevice> Set(int device, DeviceHealth& health) {
    CurrentDevice current(health);
    int before = 0;
    KEEPSET_RETURN_IF_CUDA_ERROR(health, cudaGetDevice(&before));
    if (before == device) return current;
    KEEPSET_RETURN_IF_CUDA_ERROR(health, cudaSetDevice(device));
    current.before_ = before;
    return current;
  }

  CurrentDevice(CurrentDevice&& other) noexcept
      : health_(other.health_),
        capture_(std::move(other.capture_)),
        before_(std::exchange(other.before_, std::nullopt)) {}
  CurrentDevice& operator=(CurrentDevice&&) = delete;
  ~CurrentDevice() {
    if (before_.has_value()) health_.Check(cudaSetDevice(*before_), "cudaSetDevice").IgnoreError();
  }

 private:
  explicit CurrentDevice(DeviceHealth& health) : health_(health), capture_(health) {}

  DeviceHealth& health_;
  RelaxedCapture capture_;
  std::optional<int> before_;  // nothing: it is current anyway
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_CURRENT_DEVICE_H_
