// Elementwise and row-wise glue on scores.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "base/status_macros.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/position_bitmap.h"
#include "kernels/cuda/score_glue.h"
#include "kernels/op_checks.h"
#include "kernels/row_sums.h"

namespace keepset::kernels::cuda {
namespace {

// Wider windows of a maximum are doubled up to, wider averages use prefix sums. The averages' limit
// is the CPU's, which adds the same way below it.
constexpr int64_t kDirectWindow = 32;

GlueParams GlueOn(GlueOp op, float* out, const ScoreBuffer& shape) {
  GlueParams params;
  params.op = op;
  params.out = out;
  params.rows = shape.rows();
  params.cols = shape.cols();
  params.end = shape.cols();
  return params;
}

absl::Status Queue(StreamState& state, const GlueParams& params) {
  return state.Queue("score glue", [&] { return LaunchGlue(params, state.stream()); });
}

absl::Status Queue(StreamState& state, const SlideParams& params) {
  return state.Queue("sliding window", [&] { return LaunchSlide(params, state.stream()); });
}

// What kernels that do not write in place left in the workspace, into the rows of x.
absl::Status CopyBack(StreamState& state, const float* from, int64_t length, float* to,
                      const ScoreBuffer& x) {
  const auto width = static_cast<size_t>(length) * sizeof(float);
  return state.Queue("cudaMemcpy2DAsync", [&] {
    return cudaMemcpy2DAsync(to, static_cast<size_t>(x.cols()) * sizeof(float), from, width, width,
                             static_cast<size_t>(x.rows()), cudaMemcpyDeviceToDevice,
                             state.stream());
  });
}

// x[r, t] = max of x[r, t - before .. t + after] within [0, length).
absl::Status SlidingMax(StreamState& state, int64_t length, int64_t before, int64_t after,
                        float* data, const ScoreBuffer& x) {
  const int64_t rows = x.rows();
  SlideParams params;
  params.rows = rows;
  params.in = data;
  params.in_stride = x.cols();
  params.length = length;
  const int64_t width = before + after + 1;
  if (width <= kDirectWindow) {
    KEEPSET_ASSIGN_OR_RETURN(std::byte* const workspace,
                             state.Workspace(rows * length * int64_t{sizeof(float)}));
    params.op = SlideOp::kMax;
    params.before = before;
    params.after = after;
    params.out = reinterpret_cast<float*>(workspace);
    params.out_stride = length;
    KEEPSET_RETURN_IF_ERROR(Queue(state, params));
    return CopyBack(state, params.out, length, data, x);
  }
  // Padded on the left, every window begins at its own position; windows of a power of two are
  // doubled up to the largest within the width, and two of them cover it.
  const int64_t padded = length + before;
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const workspace,
                           state.Workspace(2 * rows * padded * int64_t{sizeof(float)}));
  auto* current = reinterpret_cast<float*>(workspace);
  float* next = current + rows * padded;
  params.op = SlideOp::kPad;
  params.before = before;
  params.length = padded;
  params.out = current;
  params.out_stride = padded;
  KEEPSET_RETURN_IF_ERROR(Queue(state, params));
  params.op = SlideOp::kPairMax;
  params.before = 0;
  params.in_length = padded;
  params.in_stride = padded;
  int64_t covered = 1;
  for (; 2 * covered <= width; covered *= 2) {
    params.in = current;
    params.out = next;
    params.after = covered;
    KEEPSET_RETURN_IF_ERROR(Queue(state, params));
    std::swap(current, next);
  }
  params.in = current;
  params.out = next;
  params.after = width - covered;
  params.length = length;
  params.out_stride = length;
  KEEPSET_RETURN_IF_ERROR(Queue(state, params));
  return CopyBack(state, next, length, data, x);
}

absl::Status AveragePool(StreamState& state, int64_t kernel, int64_t length, float* data,
                         const ScoreBuffer& x) {
  const int64_t rows = x.rows();
  const int64_t out_bytes = (rows * length * int64_t{sizeof(float)} + 255) / 256 * 256;
  const bool is_wide = kernel > kDirectWindow;
  const int64_t prefix_bytes = is_wide ? rows * (length + 1) * int64_t{sizeof(double)} : 0;
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const workspace, state.Workspace(out_bytes + prefix_bytes));
  SlideParams params;
  params.op = is_wide ? SlideOp::kPrefix : SlideOp::kAverage;
  params.in = data;
  params.in_stride = x.cols();
  params.out = reinterpret_cast<float*>(workspace);
  params.out_stride = length;
  params.rows = rows;
  params.length = length;
  params.before = kernel / 2;
  params.after = kernel / 2;
  params.divisor = kernel;
  if (is_wide) {
    PrefixParams prefix;
    prefix.in = data;
    prefix.stride = x.cols();
    prefix.length = length;
    prefix.prefix = reinterpret_cast<double*>(workspace + out_bytes);
    params.prefix = prefix.prefix;
    KEEPSET_RETURN_IF_ERROR(
        state.Queue("prefix sums", [&] { return LaunchPrefix(prefix, rows, state.stream()); }));
  }
  KEEPSET_RETURN_IF_ERROR(Queue(state, params));
  return CopyBack(state, params.out, length, data, x);
}

}  // namespace

absl::Status DivideByRowMean(StreamState& state, float eps, ScoreBuffer& x) {
  KEEPSET_ASSIGN_OR_RETURN(float* const data, Cuda(x).Use(state));
  KEEPSET_ASSIGN_OR_RETURN(
      std::byte* const workspace,
      state.Workspace(x.rows() * NumSumBlocks(x.cols()) * int64_t{sizeof(double)}));
  SumParams sum;
  sum.in = data;
  sum.rows = x.rows();
  sum.cols = x.cols();
  sum.parts = reinterpret_cast<double*>(workspace);
  KEEPSET_RETURN_IF_ERROR(state.Queue("row sums", [&] { return LaunchSum(sum, state.stream()); }));
  GlueParams params = GlueOn(GlueOp::kDivideByMean, data, x);
  params.factor = eps;
  params.parts = sum.parts;
  return Queue(state, params);
}

absl::Status NormalizeRows(StreamState& state, Normalization normalization,
                           absl::Span<const SelectArgs::Range> excluded, ScoreBuffer& x) {
  KEEPSET_RETURN_IF_ERROR(CheckNormalize(excluded, x));
  KEEPSET_ASSIGN_OR_RETURN(float* const data, Cuda(x).Use(state));
  const int64_t num_parts = x.rows() * NumSumBlocks(x.cols());
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const workspace,
                           state.Workspace(2 * num_parts * int64_t{sizeof(double)}));
  SumParams sum;
  sum.in = data;
  sum.rows = x.rows();
  sum.cols = x.cols();
  sum.parts = reinterpret_cast<double*>(workspace);
  sum.kind = normalization == Normalization::kMax ? SumKind::kLargest : SumKind::kValues;
  sum.count = x.cols();
  if (!excluded.empty()) {
    std::vector<uint32_t> bitmap(static_cast<size_t>(BitmapWords(x.cols())));
    for (const SelectArgs::Range& range : excluded) {
      SetBits(range.begin, range.end, bitmap.data());
      sum.count -= range.end - range.begin;
    }
    KEEPSET_ASSIGN_OR_RETURN(
        const std::byte* const uploaded,
        state.Upload(bitmap.data(), static_cast<int64_t>(bitmap.size() * sizeof(uint32_t))));
    sum.excluded = reinterpret_cast<const uint32_t*>(uploaded);
  }
  KEEPSET_RETURN_IF_ERROR(state.Queue("row sums", [&] { return LaunchSum(sum, state.stream()); }));
  GlueParams params = GlueOn(GlueOp::kNormalize, data, x);
  params.normalization = normalization;
  params.parts = sum.parts;
  params.count = sum.count;
  if (normalization == Normalization::kStandardize) {
    sum.kind = SumKind::kSquares;
    sum.totals = sum.parts;
    sum.parts += num_parts;
    params.square_parts = sum.parts;
    KEEPSET_RETURN_IF_ERROR(
        state.Queue("row squares", [&] { return LaunchSum(sum, state.stream()); }));
  }
  return Queue(state, params);
}

absl::Status MergeRows(StreamState& state, const ScoreBuffer& in, Merge merge,
                       absl::Span<const float> weights, ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(CheckMergeRows(in, weights, out));
  KEEPSET_ASSIGN_OR_RETURN(const float* const from, Readable(state, in));
  GlueParams params = GlueOn(GlueOp::kMergeRows, Cuda(out).Overwrite(state), out);
  params.in = from;
  params.in_rows = in.rows();
  params.merge = merge;
  if (!weights.empty()) {
    KEEPSET_ASSIGN_OR_RETURN(
        const std::byte* const uploaded,
        state.Upload(weights.data(), static_cast<int64_t>(weights.size() * sizeof(float))));
    params.weights = reinterpret_cast<const float*>(uploaded);
  }
  return Queue(state, params);
}

absl::Status Accumulate(StreamState& state, const ScoreBuffer& x, Merge merge, float weight,
                        ScoreBuffer& acc) {
  KEEPSET_RETURN_IF_ERROR(CheckShape(x, acc.rows(), acc.cols(), "accumulate"));
  KEEPSET_ASSIGN_OR_RETURN(const float* const from, Readable(state, x));
  KEEPSET_ASSIGN_OR_RETURN(float* const to, Cuda(acc).Use(state));
  GlueParams params = GlueOn(GlueOp::kAccumulate, to, acc);
  params.in = from;
  params.merge = merge;
  params.factor = weight;
  return Queue(state, params);
}

absl::Status Multiply(StreamState& state, const ScoreBuffer& y, float factor, ScoreBuffer& x) {
  KEEPSET_RETURN_IF_ERROR(CheckMultiply(y, x));
  KEEPSET_ASSIGN_OR_RETURN(const float* const from, Readable(state, y));
  KEEPSET_ASSIGN_OR_RETURN(float* const to, Cuda(x).Use(state));
  GlueParams params = GlueOn(GlueOp::kMultiply, to, x);
  params.in = from;
  params.in_rows = y.rows();
  params.factor = factor;
  return Queue(state, params);
}

absl::Status Pool(StreamState& state, PoolKind kind, int64_t kernel, int64_t length,
                  ScoreBuffer& x) {
  KEEPSET_RETURN_IF_ERROR(CheckPool(kernel, length, x));
  if (kernel == 1 || length == 0) return absl::OkStatus();
  KEEPSET_ASSIGN_OR_RETURN(float* const data, Cuda(x).Use(state));
  if (kind == PoolKind::kAverage) return AveragePool(state, kernel, length, data, x);
  const int64_t half = std::min(kernel / 2, length);
  return SlidingMax(state, length, half, half, data, x);
}

absl::Status DilateForward(StreamState& state, int64_t dilate, ScoreBuffer& x) {
  KEEPSET_RETURN_IF_ERROR(CheckDilate(dilate));
  if (dilate == 0) return absl::OkStatus();
  KEEPSET_ASSIGN_OR_RETURN(float* const data, Cuda(x).Use(state));
  return SlidingMax(state, x.cols(), std::min(dilate, x.cols()), 0, data, x);
}

absl::Status Fill(StreamState& state, int64_t begin, int64_t end, float value, ScoreBuffer& x) {
  KEEPSET_RETURN_IF_ERROR(CheckFill(begin, end, x));
  KEEPSET_ASSIGN_OR_RETURN(float* const data, Cuda(x).Use(state));
  GlueParams params = GlueOn(GlueOp::kFill, data, x);
  params.begin = begin;
  params.end = end;
  params.factor = value;
  return Queue(state, params);
}

namespace {

// The sums and the terms of the entropy of one row, in parts: [2, sum blocks].
absl::Status QueueMass(StreamState& state, const ScoreBuffer& x, int64_t row, double* parts) {
  KEEPSET_RETURN_IF_ERROR(CheckMassRow(row, x));
  KEEPSET_ASSIGN_OR_RETURN(const float* const data, Readable(state, x));
  SumParams params;
  params.in = data + row * x.cols();
  params.rows = 1;
  params.cols = x.cols();
  params.parts = parts;
  KEEPSET_RETURN_IF_ERROR(
      state.Queue("row sums", [&] { return LaunchSum(params, state.stream()); }));
  params.kind = SumKind::kEntropy;
  params.totals = params.parts;
  params.parts += NumSumBlocks(x.cols());
  return state.Queue("entropy", [&] { return LaunchSum(params, state.stream()); });
}

absl::StatusOr<ComputeBackend::Mass> ReadMass(const double* parts, int64_t blocks) {
  ComputeBackend::Mass mass;
  for (int64_t block = 0; block < blocks; ++block) mass.sum += parts[block];
  KEEPSET_RETURN_IF_ERROR(CheckMass(mass.sum));
  for (int64_t block = 0; block < blocks; ++block) mass.entropy += parts[blocks + block];
  return mass;
}

// `row` of every buffer.
absl::StatusOr<std::vector<ComputeBackend::Mass>> MassesOfRow(
    StreamState& state, absl::Span<const ScoreBuffer* const> buffers, int64_t row) {
  int64_t values = 0;
  for (const ScoreBuffer* const buffer : buffers) values += 2 * NumSumBlocks(buffer->cols());
  const int64_t bytes = values * int64_t{sizeof(double)};
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const workspace, state.Workspace(bytes));
  if (!state.is_queued()) {
    KEEPSET_RETURN_IF_ERROR(state.Wait());
    return std::vector<ComputeBackend::Mass>(buffers.size(), {1.0, 1.0});
  }
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const results, state.Results(bytes));
  auto* parts = reinterpret_cast<double*>(workspace);
  for (const ScoreBuffer* const buffer : buffers) {
    KEEPSET_RETURN_IF_ERROR(QueueMass(state, *buffer, row, parts));
    parts += 2 * NumSumBlocks(buffer->cols());
  }
  KEEPSET_RETURN_IF_CUDA_ERROR(state.health(),
                               cudaMemcpyAsync(results, workspace, static_cast<size_t>(bytes),
                                               cudaMemcpyDeviceToHost, state.stream()));
  KEEPSET_RETURN_IF_ERROR(state.Wait());
  const auto* found = reinterpret_cast<const double*>(results);
  std::vector<ComputeBackend::Mass> masses;
  for (const ScoreBuffer* const buffer : buffers) {
    const int64_t blocks = NumSumBlocks(buffer->cols());
    KEEPSET_ASSIGN_OR_RETURN(const ComputeBackend::Mass mass, ReadMass(found, blocks));
    masses.push_back(mass);
    found += 2 * blocks;
  }
  return masses;
}

}  // namespace

absl::StatusOr<ComputeBackend::Mass> MassAndEntropy(StreamState& state, const ScoreBuffer& x,
                                                    int64_t row) {
  const ScoreBuffer* const buffers[] = {&x};
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<ComputeBackend::Mass> masses,
                           MassesOfRow(state, buffers, row));
  return masses.front();
}

absl::StatusOr<std::vector<ComputeBackend::Mass>> MassAndEntropyOfEach(
    StreamState& state, absl::Span<const ScoreBuffer* const> buffers) {
  return MassesOfRow(state, buffers, /*row=*/0);
}

}  // namespace keepset::kernels::cuda
