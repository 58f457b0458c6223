#include "kernels/cuda/score_glue.h"
#include "kernels/cuda/score_glue_kernel.h"
#include "kernels/cuda/simt_device.cuh"

namespace keepset::kernels::cuda {

template cudaError_t Launch<GlueKernel>(const LaunchShape&, const GlueKernel::Params&,
                                        cudaStream_t);
template cudaError_t Launch<SumKernel>(const LaunchShape&, const SumKernel::Params&, cudaStream_t);
template cudaError_t Launch<SlideKernel>(const LaunchShape&, const SlideKernel::Params&,
                                         cudaStream_t);
template cudaError_t Launch<PrefixKernel>(const LaunchShape&, const PrefixKernel::Params&,
                                          cudaStream_t);

}  // namespace keepset::kernels::cuda
