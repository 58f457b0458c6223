#include "kernels/cuda/columns_kernel.h"
#include "kernels/cuda/row_stats_kernel.h"
#include "kernels/cuda/simt_device.cuh"
#include "kernels/cuda/window_scores.h"

namespace keepset::kernels::cuda {

#define KEEPSET_LAUNCH(...) \
  template cudaError_t Launch<__VA_ARGS__>(const LaunchShape&, const WindowParams&, cudaStream_t)

KEEPSET_LAUNCH(PrepareRows);
KEEPSET_LAUNCH(MergeRowStats);
KEEPSET_LAUNCH(MmaRowStats<DType::kBF16>);
KEEPSET_LAUNCH(MmaRowStats<DType::kF16>);
KEEPSET_LAUNCH(FmaRowStats);
KEEPSET_LAUNCH(MmaColumns<DType::kBF16>);
KEEPSET_LAUNCH(MmaColumns<DType::kF16>);
KEEPSET_LAUNCH(FmaColumns);

#undef KEEPSET_LAUNCH

}  // namespace keepset::kernels::cuda
