#include "kernels/cuda/row_ops.h"
#include "kernels/cuda/row_ops_kernel.h"
#include "kernels/cuda/simt_device.cuh"

namespace keepset::kernels::cuda {

template cudaError_t Launch<RowNormsKernel>(const LaunchShape&, const RowNormsKernel::Params&,
                                            cudaStream_t);
template cudaError_t Launch<TileColumnsKernel>(const LaunchShape&, const TileColumnsKernel::Params&,
                                               cudaStream_t);
template cudaError_t Launch<GatherKernel>(const LaunchShape&, const GatherKernel::Params&,
                                          cudaStream_t);

}  // namespace keepset::kernels::cuda
