#include "kernels/cuda/select.h"
#include "kernels/cuda/select_kernel.h"
#include "kernels/cuda/simt_device.cuh"

namespace keepset::kernels::cuda {

template cudaError_t Launch<SelectKernel>(const LaunchShape&, const SelectKernel::Params&,
                                          cudaStream_t);

}  // namespace keepset::kernels::cuda
