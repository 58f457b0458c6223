#include "kernels/cuda/simt_device.cuh"
#include "kernels/cuda/window_scores.h"
#include "kernels/cuda/window_scores_kernel.h"

namespace keepset::kernels::cuda {

#define KEEPSET_LAUNCH(...) \
  template cudaError_t Launch<__VA_ARGS__>(const LaunchShape&, const WindowParams&, cudaStream_t)

KEEPSET_LAUNCH(PrepareRows);
KEEPSET_LAUNCH(MergeRowStats);
KEEPSET_LAUNCH(MmaRowStats<DType::kBF16>);
KEEPSET_LAUNCH(MmaRowStats<DType::kF16>);
KEEPSET_LAUNCH(FmaRowStats);
KEEPSET_LAUNCH(MmaColumns<DType::kBF16, ColumnReduction::kSum>);
KEEPSET_LAUNCH(MmaColumns<DType::kBF16, ColumnReduction::kMax>);
KEEPSET_LAUNCH(MmaColumns<DType::kF16, ColumnReduction::kSum>);
KEEPSET_LAUNCH(MmaColumns<DType::kF16, ColumnReduction::kMax>);
KEEPSET_LAUNCH(FmaColumns<ColumnReduction::kSum>);
KEEPSET_LAUNCH(FmaColumns<ColumnReduction::kMax>);

#undef KEEPSET_LAUNCH

}  // namespace keepset::kernels::cuda
