// A stream that a caller wants an operation's work queued on.
#ifndef KEEPSET_KERNELS_CUDA_CALLERS_STREAM_H_
#define KEEPSET_KERNELS_CUDA_CALLERS_STREAM_H_

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "kernels/cuda/cuda_status.h"

namespace keepset::kernels::cuda {

// Whether work can be queued on it and waited for, as far as the runtime can tell; `device` is
// current. Null, which is no stream of the caller's, is OK. InvalidArgument: of another device, no
// stream, or cudaStreamPerThread, which is another one on each thread. FailedPrecondition: it is
// captured. Internal: what was queued before has faulted, which `health` remembers.
absl::Status CheckCallersStream(cudaStream_t stream, int device, DeviceHealth& health);

// Whether it is captured, alone.
absl::Status CheckNotInCapture(cudaStream_t stream, DeviceHealth& health);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_CALLERS_STREAM_H_
