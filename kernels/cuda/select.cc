#include "kernels/cuda/select.h"

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/select_kernel.h"

namespace keepset::kernels::cuda {

int SelectThreads(int64_t length) {
  // A block of few positions would only wait for its idle warps.
  constexpr int64_t kPositionsPerThread = 4;
  int64_t threads = 128;
  while (threads < SelectKernel::kMaxThreads && threads * kPositionsPerThread < length) {
    threads *= 2;
  }
  return static_cast<int>(threads);
}

cudaError_t LaunchSelect(const SelectParams& params, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid_x = params.rows;
  shape.threads = SelectThreads(params.longest);
  shape.shared_bytes = sizeof(SelectShared);
  return Launch<SelectKernel>(shape, params, stream);
}

}  // namespace keepset::kernels::cuda
