// Calls beside a CUDA graph that the engine captures. While a stream of the process is captured in
// the default mode, every thread is forbidden what a graph cannot hold (to allocate, to free, to
// wait for a stream), unless the thread says that it means none of it for the graph; a call that is
// forbidden fails and spoils the capture (CUDA Runtime API, cudaThreadExchangeStreamCaptureMode).
#ifndef KEEPSET_KERNELS_CUDA_RELAXED_CAPTURE_H_
#define KEEPSET_KERNELS_CUDA_RELAXED_CAPTURE_H_

#include <cuda_runtime_api.h>

#include <optional>
#include <utility>

#include "kernels/cuda/cuda_status.h"

namespace keepset::kernels::cuda {

// The thread's calls concern no capture until it ends; then the thread's mode is the one before
// again. Calls on a captured stream, on the legacy stream beside one that waits for it, and waits
// for the whole device stay forbidden. Move-only; ends on the thread it began on, the latest first.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(DeviceHealth& health) : health_(health) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    if (Exchange(&mode)) before_ = mode;
  }
  RelaxedCapture(RelaxedCapture&& other) noexcept
      : health_(other.health_), before_(std::exchange(other.before_, std::nullopt)) {}
  RelaxedCapture& operator=(RelaxedCapture&&) = delete;
  ~RelaxedCapture() {
    if (before_.has_value()) Exchange(&*before_);
  }

 private:
  // A device that refuses refuses the calls to come, too, which say so.
  bool Exchange(cudaStreamCaptureMode* mode) {
    return health_
        .Check(cudaThreadExchangeStreamCaptureMode(mode), "cudaThreadExchangeStreamCaptureMode")
        .ok();
  }

  DeviceHealth& health_;
  std::optional<cudaStreamCaptureMode> before_;  // nothing: it was not changed
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_RELAXED_CAPTURE_H_
