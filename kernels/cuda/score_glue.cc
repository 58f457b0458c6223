#include "kernels/cuda/score_glue.h"

#include <algorithm>
#include <cstdint>

#include "kernels/row_sums.h"

namespace keepset::kernels::cuda {
namespace {

constexpr int64_t kMaxGridY = 65535;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

cudaError_t LaunchGlue(const GlueParams& params, cudaStream_t stream) {
  LaunchShape shape;
  shape.threads = GlueKernel::kMaxThreads;
  shape.grid_x = CeilDiv(params.end - params.begin, shape.threads);
  shape.grid_y = std::min(params.rows, kMaxGridY);
  return Launch<GlueKernel>(shape, params, stream);
}

cudaError_t LaunchSum(const SumParams& params, cudaStream_t stream) {
  LaunchShape shape;
  shape.threads = SumKernel::kMaxThreads;
  shape.grid_x = NumSumBlocks(params.cols);
  shape.grid_y = std::min(params.rows, kMaxGridY);
  shape.shared_bytes = kSumLanes * int64_t{sizeof(double)};
  return Launch<SumKernel>(shape, params, stream);
}

cudaError_t LaunchSlide(const SlideParams& params, cudaStream_t stream) {
  LaunchShape shape;
  shape.threads = SlideKernel::kMaxThreads;
  shape.grid_x = CeilDiv(params.length, shape.threads);
  shape.grid_y = std::min(params.rows, kMaxGridY);
  return Launch<SlideKernel>(shape, params, stream);
}

cudaError_t LaunchPrefix(const PrefixParams& params, int64_t rows, cudaStream_t stream) {
  LaunchShape shape;
  shape.threads = PrefixKernel::kMaxThreads;
  shape.grid_x = rows;
  shape.shared_bytes = int64_t{2} * shape.threads * int64_t{sizeof(double)};
  return Launch<PrefixKernel>(shape, params, stream);
}

}  // namespace keepset::kernels::cuda
