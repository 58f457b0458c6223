// Elementwise and row-wise ops on score buffers [rows, cols]. Every element is computed by one
// thread with the roundings of the CPU backend, and sums follow the order of row_sums.h, so that
// equal scores in give equal scores out on both, except average pools wider than 32 (fp64 prefix
// sums, which each backend adds in an order of its own) and the last place of the entropy.
#ifndef KEEPSET_KERNELS_CUDA_SCORE_GLUE_H_
#define KEEPSET_KERNELS_CUDA_SCORE_GLUE_H_

#include <cstdint>

#include "kernels/compute_backend.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/launch.h"

namespace keepset::kernels::cuda {

enum class GlueOp {
  kMergeRows,     // out[r] = merge over the group rows of in, weighted
  kAccumulate,    // out = op(out, factor * in)
  kMultiply,      // out *= in * factor; in_rows is rows or 1
  kFill,          // out[:, begin..end) = factor
  kDivideByMean,  // out /= max(factor, mean of the row by `parts`)
  kNormalize,     // out = (out - shift) * scale, both of the row by `parts`, `square_parts`
};

struct GlueParams {
  GlueOp op = GlueOp::kFill;
  const float* in = nullptr;
  float* out = nullptr;
  int64_t rows = 0;  // of out
  int64_t cols = 0;
  int64_t begin = 0;  // columns to treat
  int64_t end = 0;
  int64_t in_rows = 0;
  Merge merge = Merge::kMean;
  const float* weights = nullptr;  // [in_rows] or null, device memory
  float factor = 1.0f;
  const double* parts = nullptr;  // [rows, sum blocks]: of kNormalize as SumKind says
  // Of kNormalize.
  Normalization normalization = Normalization::kMax;
  const double* square_parts = nullptr;  // [rows, sum blocks], of kStandardize
  int64_t count = 0;                     // positions that are not excluded
};

struct GlueKernel {
  using Params = GlueParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocksPerMultiprocessor = 2;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// What is summed over the positions of a row that are not excluded.
enum class SumKind {
  kValues,
  kEntropy,  // of the shares of the sum that totals make
  kSquares,  // of the distances from the mean that totals and count make
  kLargest,  // no sum: the largest value, at least 0
};

struct SumParams {
  SumKind kind = SumKind::kValues;
  const float* in = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  double* parts = nullptr;         // [rows, sum blocks]: what is computed
  const double* totals = nullptr;  // [rows, sum blocks]: the parts of kValues
  // Bit t % 32 of word t / 32: position t is excluded. Null: none is.
  const uint32_t* excluded = nullptr;
  int64_t count = 0;  // positions that are not excluded, of kSquares
};

// One block of threads per block of columns and row.
struct SumKernel {
  using Params = SumParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocksPerMultiprocessor = 2;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// Sliding windows out of place.
enum class SlideOp {
  kAverage,  // out[t] = sum of in[t - before .. t + after] / divisor in fp32, zeros outside
  kMax,      // out[t] = max of in[t - before .. t + after] within [0, length)
  kPad,      // out[t] = in[t - before], -inf where t < before
  kPairMax,  // out[t] = max(in[t], in[min(t + after, in_length - 1)])
  kPrefix,   // wide average by the prefix sums: (prefix[end] - prefix[begin]) / divisor
};

struct SlideParams {
  SlideOp op = SlideOp::kMax;
  const float* in = nullptr;
  float* out = nullptr;
  int64_t rows = 0;
  int64_t in_stride = 0;  // floats between rows of in
  int64_t out_stride = 0;
  int64_t length = 0;     // positions to write
  int64_t in_length = 0;  // positions to read, of kPairMax
  int64_t before = 0;
  int64_t after = 0;
  int64_t divisor = 1;
  const double* prefix = nullptr;  // [rows, length + 1]
};

struct SlideKernel {
  using Params = SlideParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocksPerMultiprocessor = 2;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

struct PrefixParams {
  const float* in = nullptr;
  int64_t stride = 0;
  int64_t length = 0;
  double* prefix = nullptr;  // [rows, length + 1]
};

// fp64 prefix sums; one block per row.
struct PrefixKernel {
  using Params = PrefixParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocksPerMultiprocessor = 1;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

cudaError_t LaunchGlue(const GlueParams& params, cudaStream_t stream);
cudaError_t LaunchSum(const SumParams& params, cudaStream_t stream);
cudaError_t LaunchSlide(const SlideParams& params, cudaStream_t stream);
cudaError_t LaunchPrefix(const PrefixParams& params, int64_t rows, cudaStream_t stream);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_SCORE_GLUE_H_
