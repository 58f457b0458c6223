#include "kernels/cuda/cuda_status.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "base/cuda_abi.h"

namespace keepset::kernels::cuda {

bool IsStickyError(cudaError_t error) {
  // Kernels whose fault has no code of its own; nothing is imported here.
  return error == cudaErrorUnknown || cuda_abi::IsLost(static_cast<cuda_abi::Result>(error));
}

absl::Status DeviceHealth::Check(cudaError_t error, absl::string_view call) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string message =
      absl::StrCat("cuda: ", call.substr(0, call.find('(')), ": ", cudaGetErrorName(error), " (",
                   cudaGetErrorString(error), ")");
  if (error == cudaErrorMemoryAllocation) return absl::ResourceExhaustedError(message);
  absl::Status status = absl::InternalError(message);
  if (IsStickyError(error)) {
    const absl::MutexLock lock(&mutex_);
    if (first_.ok()) first_ = status;
  }
  return status;
}

absl::Status DeviceHealth::status() const {
  const absl::MutexLock lock(&mutex_);
  return first_;
}

}  // namespace keepset::kernels::cuda
