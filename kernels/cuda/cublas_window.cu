#include "kernels/cuda/cublas_kernel.h"
#include "kernels/cuda/cublas_window.h"
#include "kernels/cuda/simt_device.cuh"

namespace keepset::kernels::cuda {

#define KEEPSET_LAUNCH(...) \
  template cudaError_t Launch<__VA_ARGS__>(const LaunchShape&, const CublasParams&, cudaStream_t)

KEEPSET_LAUNCH(PackQueries);
KEEPSET_LAUNCH(PackKeys);
KEEPSET_LAUNCH(PieceStats);
KEEPSET_LAUNCH(PieceColumns);

#undef KEEPSET_LAUNCH

}  // namespace keepset::kernels::cuda
