#include "kernels/cuda/callers_stream.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace keepset::kernels::cuda {
namespace {

// Errors here are the caller's: they say nothing of the device's health.
absl::Status UnknownStream(cudaError_t error) {
  cudaGetLastError();
  return absl::InvalidArgumentError(
      absl::StrCat("stream: ", cudaGetErrorName(error), " (", cudaGetErrorString(error),
                   "), want a cudaStream_t of this process that is not destroyed"));
}

}  // namespace

absl::Status CheckNotInCapture(cudaStream_t stream) {
  if (stream == nullptr) return absl::OkStatus();
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(stream, &status);
  // The legacy default stream while another stream of the process is captured.
  const bool is_implicit = error == cudaErrorStreamCaptureImplicit;
  if (error != cudaSuccess && !is_implicit) return UnknownStream(error);
  if (status == cudaStreamCaptureStatusNone && !is_implicit) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "stream: it is captured into a graph, and an operation waits for values on the host: want a "
      "stream that is not in capture");
}

absl::Status CheckCallersStream(cudaStream_t stream, int device) {
  if (stream == nullptr) return absl::OkStatus();
  KEEPSET_RETURN_IF_ERROR(CheckNotInCapture(stream));
  // The default streams are those of the current device.
  if (stream == cudaStreamLegacy || stream == cudaStreamPerThread) return absl::OkStatus();
  int found = device;
  const cudaError_t error = cudaStreamGetDevice(stream, &found);
  if (error == cudaErrorCallRequiresNewerDriver) {
    cudaGetLastError();
    return absl::OkStatus();
  }
  if (error != cudaSuccess) return UnknownStream(error);
  if (found == device) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("stream: of device ", found, ", want one of device ", device));
}

}  // namespace keepset::kernels::cuda
