// Elementwise and row-wise glue on scores. Columns are split into fixed blocks, each element is
// computed by one thread, and sums run in the order of row_sums.h.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cpu/ops.h"
#include "kernels/op_checks.h"
#include "kernels/row_sums.h"

namespace keepset::kernels::cpu {
namespace {

// fn(row, begin, end) over all rows in blocks of columns.
void ForBlocks(CpuContext& context, int64_t rows, int64_t cols,
               absl::FunctionRef<void(int64_t row, int64_t begin, int64_t end)> fn) {
  const int64_t blocks = (cols + kSumBlockColumns - 1) / kSumBlockColumns;
  const auto run = [&](int64_t task, int) {
    const int64_t begin = task % blocks * kSumBlockColumns;
    fn(task / blocks, begin, std::min(begin + kSumBlockColumns, cols));
  };
  if (rows * cols <= 2 * kSumBlockColumns) {
    // Less work than waking a thread.
    for (int64_t task = 0; task < rows * blocks; ++task) run(task, 0);
    return;
  }
  context.ParallelFor(rows * blocks, run);
}

double SumRow(const float* row, int64_t cols) {
  return SumBlocks(cols, [row](int64_t t) { return static_cast<double>(row[t]); });
}

}  // namespace

absl::Status DivideByRowMean(CpuContext& context, float eps, ScoreBuffer& x) {
  const int64_t rows = x.rows();
  const int64_t cols = x.cols();
  float* data = x.data();
  std::vector<float> divisors(rows);
  context.ParallelFor(rows, [&](int64_t row, int) {
    const double mean = SumRow(data + row * cols, cols) / static_cast<double>(cols);
    divisors[row] = std::max(eps, static_cast<float>(mean));
  });
  ForBlocks(context, rows, cols, [&](int64_t row, int64_t begin, int64_t end) {
    const float divisor = divisors[row];
    float* to = data + row * cols;
    for (int64_t t = begin; t < end; ++t) to[t] /= divisor;
  });
  return absl::OkStatus();
}

absl::Status MergeRows(CpuContext& context, const ScoreBuffer& in, Merge merge,
                       absl::Span<const float> weights, ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(CheckMergeRows(in, weights, out));
  const int64_t cols = in.cols();
  const int64_t group = in.rows() / out.rows();
  const float* from = in.data();
  float* to = out.data();
  ForBlocks(context, out.rows(), cols, [&](int64_t row, int64_t begin, int64_t end) {
    float* acc = to + row * cols;
    for (int64_t j = 0; j < group; ++j) {
      const int64_t source = row * group + j;
      const float* x = from + source * cols;
      const float weight = weights.empty() ? 1.0f : weights[source];
      if (j == 0) {
        for (int64_t t = begin; t < end; ++t) acc[t] = x[t] * weight;
      } else if (merge == Merge::kMax) {
        for (int64_t t = begin; t < end; ++t) acc[t] = std::max(acc[t], x[t] * weight);
      } else {
        for (int64_t t = begin; t < end; ++t) acc[t] += x[t] * weight;
      }
    }
    if (merge == Merge::kMean) {
      const float divisor = static_cast<float>(group);
      for (int64_t t = begin; t < end; ++t) acc[t] /= divisor;
    }
  });
  return absl::OkStatus();
}

absl::Status Accumulate(CpuContext& context, const ScoreBuffer& x, Merge merge, float weight,
                        ScoreBuffer& acc) {
  KEEPSET_RETURN_IF_ERROR(CheckShape(x, acc.rows(), acc.cols(), "accumulate"));
  const int64_t cols = x.cols();
  const float* from = x.data();
  float* to = acc.data();
  ForBlocks(context, x.rows(), cols, [&](int64_t row, int64_t begin, int64_t end) {
    const float* a = from + row * cols;
    float* b = to + row * cols;
    if (merge == Merge::kMax) {
      for (int64_t t = begin; t < end; ++t) b[t] = std::max(b[t], weight * a[t]);
    } else {
      for (int64_t t = begin; t < end; ++t) b[t] += weight * a[t];
    }
  });
  return absl::OkStatus();
}

absl::Status Multiply(CpuContext& context, const ScoreBuffer& y, float factor, ScoreBuffer& x) {
  KEEPSET_RETURN_IF_ERROR(CheckMultiply(y, x));
  const int64_t cols = x.cols();
  const int64_t step = y.rows() == 1 ? 0 : cols;
  const float* from = y.data();
  float* to = x.data();
  ForBlocks(context, x.rows(), cols, [&](int64_t row, int64_t begin, int64_t end) {
    const float* a = from + row * step;
    float* b = to + row * cols;
    for (int64_t t = begin; t < end; ++t) b[t] *= a[t] * factor;
  });
  return absl::OkStatus();
}

absl::Status Fill(CpuContext& context, int64_t begin, int64_t end, float value, ScoreBuffer& x) {
  KEEPSET_RETURN_IF_ERROR(CheckFill(begin, end, x));
  const int64_t cols = x.cols();
  float* data = x.data();
  ForBlocks(context, x.rows(), end - begin, [&](int64_t row, int64_t from, int64_t to) {
    std::fill(data + row * cols + begin + from, data + row * cols + begin + to, value);
  });
  return absl::OkStatus();
}

absl::StatusOr<ComputeBackend::Mass> MassAndEntropy(CpuContext& context, const ScoreBuffer& x,
                                                    int64_t row) {
  KEEPSET_RETURN_IF_ERROR(CheckMassRow(row, x));
  const int64_t cols = x.cols();
  const float* values = x.data() + row * cols;
  ComputeBackend::Mass mass;
  mass.sum = SumRow(values, cols);
  KEEPSET_RETURN_IF_ERROR(CheckMass(mass.sum));
  std::vector<double> parts((cols + kSumBlockColumns - 1) / kSumBlockColumns);
  ForBlocks(context, 1, cols, [&](int64_t, int64_t begin, int64_t end) {
    parts[begin / kSumBlockColumns] = SumBlock(begin, end, [&](int64_t t) {
      const double p = values[t] / mass.sum;
      return p * -std::log(std::max(p, kSmallestProbability));
    });
  });
  for (double part : parts) mass.entropy += part;
  return mass;
}

}  // namespace keepset::kernels::cpu
