#include "kernels/cuda/callers_stream.h"

#include "absl/strings/str_cat.h"
#include "base/cuda_abi.h"
#include "base/status_macros.h"

namespace keepset::kernels::cuda {
namespace {

// The runtime answers with faults of earlier kernels here, too; else the error is the caller's and
// says nothing of the device's health. A destroyed stream can have taken its context along.
absl::Status UnknownStream(cudaError_t error, DeviceHealth& health) {
  cudaGetLastError();
  const bool is_of_context = error == cudaErrorContextIsDestroyed ||
                             static_cast<cuda_abi::Result>(error) == cuda_abi::kInvalidContext;
  if (IsStickyError(error) && !is_of_context) {
    return health.Check(error, "stream");
  }
  return absl::InvalidArgumentError(
      absl::StrCat("stream: ", cudaGetErrorName(error), " (", cudaGetErrorString(error),
                   "), want a cudaStream_t of this process that is not destroyed"));
}

}  // namespace

absl::Status CheckNotInCapture(cudaStream_t stream, DeviceHealth& health) {
  if (stream == nullptr) return absl::OkStatus();
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(stream, &status);
  // The legacy default stream while another stream of the process is captured.
  const bool is_implicit = error == cudaErrorStreamCaptureImplicit;
  if (is_implicit) cudaGetLastError();
  if (error != cudaSuccess && !is_implicit) return UnknownStream(error, health);
  if (status == cudaStreamCaptureStatusNone && !is_implicit) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "stream: it is captured into a graph, and an operation waits for values on the host: want a "
      "stream that is not in capture");
}

absl::Status CheckCallersStream(cudaStream_t stream, int device, DeviceHealth& health) {
  if (stream == nullptr) return absl::OkStatus();
  if (stream == cudaStreamPerThread) {
    return absl::InvalidArgumentError(
        "stream: cudaStreamPerThread is another stream on each thread, want a stream that was "
        "created, or cudaStreamLegacy");
  }
  KEEPSET_RETURN_IF_ERROR(CheckNotInCapture(stream, health));
  // The default stream is that of the current device.
  if (stream == cudaStreamLegacy) return absl::OkStatus();
  int found = device;
  const cudaError_t error = cudaStreamGetDevice(stream, &found);
  if (error == cudaErrorCallRequiresNewerDriver) {
    cudaGetLastError();
    return absl::OkStatus();
  }
  if (error != cudaSuccess) return UnknownStream(error, health);
  if (found == device) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("stream: of device ", found, ", want one of device ", device));
}

}  // namespace keepset::kernels::cuda
