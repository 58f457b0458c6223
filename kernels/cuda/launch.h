// Starting a kernel on a stream. A kernel is a struct with `Params`, `kMaxThreads`,
// `kMinBlocksPerMultiprocessor` and a static template Run(simt, params) (*_kernel.h); the .cu file
// of the op instantiates Launch for it.
#ifndef KEEPSET_KERNELS_CUDA_LAUNCH_H_
#define KEEPSET_KERNELS_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace keepset::kernels::cuda {

struct LaunchShape {
  int64_t grid_x = 1;
  int64_t grid_y = 1;
  int64_t grid_z = 1;
  int threads = 1;
  int64_t shared_bytes = 0;
};

// Shared memory that a block may have without AllowMostShared.
constexpr int64_t kSharedWithoutAsking = 48 << 10;

// Queues the kernel and returns what the launch said. Never waits. A grid without blocks is not
// launched.
template <typename Kernel>
cudaError_t Launch(const LaunchShape& shape, const typename Kernel::Params& params,
                   cudaStream_t stream);

// Lets `function` be launched on the current device with as much shared memory as a block may have
// there. The limit is one of the function in the whole process, and launches beyond it fail: it is
// always set to the same value, so that a thread that launches a small block cannot take it from
// one that is about to launch a large one. Thread-safe.
cudaError_t AllowMostShared(const void* function);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_LAUNCH_H_
