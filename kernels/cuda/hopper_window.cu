#include "kernels/cuda/hopper_columns_kernel.h"
#include "kernels/cuda/hopper_device.cuh"
#include "kernels/cuda/hopper_row_stats_kernel.h"
#include "kernels/cuda/hopper_window.h"

namespace keepset::kernels::cuda {

#define KEEPSET_LAUNCH(...)                                                               \
  template cudaError_t LaunchHopper<__VA_ARGS__>(const LaunchShape&, const HopperParams&, \
                                                 cudaStream_t)

KEEPSET_LAUNCH(HopperColumns<DType::kBF16, 64>);
KEEPSET_LAUNCH(HopperColumns<DType::kBF16, 128>);
KEEPSET_LAUNCH(HopperColumns<DType::kBF16, 256>);
KEEPSET_LAUNCH(HopperColumns<DType::kF16, 64>);
KEEPSET_LAUNCH(HopperColumns<DType::kF16, 128>);
KEEPSET_LAUNCH(HopperColumns<DType::kF16, 256>);
KEEPSET_LAUNCH(HopperRowStats<DType::kBF16, 64>);
KEEPSET_LAUNCH(HopperRowStats<DType::kBF16, 128>);
KEEPSET_LAUNCH(HopperRowStats<DType::kF16, 64>);
KEEPSET_LAUNCH(HopperRowStats<DType::kF16, 128>);

#undef KEEPSET_LAUNCH

}  // namespace keepset::kernels::cuda
