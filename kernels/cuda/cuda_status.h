// CUDA errors as Status, and whether a device can still be used.
#ifndef KEEPSET_KERNELS_CUDA_CUDA_STATUS_H_
#define KEEPSET_KERNELS_CUDA_CUDA_STATUS_H_

#include <cuda_runtime_api.h>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"

namespace keepset::kernels::cuda {

// After such an error every later call of the process on the device fails, too: only a new process
// helps. Those of cuda_abi::IsLost, and cudaErrorUnknown.
bool IsStickyError(cudaError_t error);

// Remembers the first sticky error of a device. Thread-safe.
class DeviceHealth {
 public:
  // OK for cudaSuccess; ResourceExhausted when device memory ran out; else Internal. `call` names
  // what was called.
  absl::Status Check(cudaError_t error, absl::string_view call);
  // The first sticky error, or OK.
  absl::Status status() const;

 private:
  mutable absl::Mutex mutex_;
  absl::Status first_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::kernels::cuda

// Returns from the calling function unless `call`, an expression of type cudaError_t, is
// cudaSuccess.
#define KEEPSET_RETURN_IF_CUDA_ERROR(health, call)                          \
  do {                                                                      \
    if (::absl::Status keepset_cuda_status = (health).Check((call), #call); \
        !keepset_cuda_status.ok()) {                                        \
      return keepset_cuda_status;                                           \
    }                                                                       \
  } while (false)

#endif  // KEEPSET_KERNELS_CUDA_CUDA_STATUS_H_
