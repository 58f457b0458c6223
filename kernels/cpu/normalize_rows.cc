// Rows of scores on a common scale. Statistics of a row are taken by one thread in fp64, in order.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/cpu/ops.h"

namespace keepset::kernels::cpu {
namespace {

using Range = SelectArgs::Range;

// fn(begin, end) for every run of positions outside `excluded`.
template <typename Fn>
void ForIncluded(absl::Span<const Range> excluded, int64_t cols, const Fn& fn) {
  int64_t begin = 0;
  for (const Range& range : excluded) {
    if (range.begin > begin) fn(begin, range.begin);
    begin = range.end;
  }
  if (begin < cols) fn(begin, cols);
}

// value -> (value - shift) * factor; factor 0 when the row has no scale.
struct Scale {
  float shift = 0.0f;
  float factor = 0.0f;
};

Scale Standardization(const float* row, int64_t cols, absl::Span<const Range> excluded) {
  double sum = 0.0;
  int64_t count = 0;
  ForIncluded(excluded, cols, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) sum += row[t];
    count += end - begin;
  });
  if (count == 0) return {};
  const double mean = sum / static_cast<double>(count);
  double squares = 0.0;
  ForIncluded(excluded, cols, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) squares += (row[t] - mean) * (row[t] - mean);
  });
  const double deviation = std::sqrt(squares / static_cast<double>(count));
  if (!(deviation > 0.0)) return {};
  return {static_cast<float>(mean), static_cast<float>(1.0 / deviation)};
}

Scale ScaleOf(Normalization normalization, const float* row, int64_t cols,
              absl::Span<const Range> excluded) {
  if (normalization == Normalization::kStandardize) return Standardization(row, cols, excluded);
  double largest = 0.0;
  double sum = 0.0;
  ForIncluded(excluded, cols, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      largest = std::max(largest, static_cast<double>(row[t]));
      sum += row[t];
    }
  });
  const double divisor = normalization == Normalization::kMax ? largest : sum;
  // A denormal divisor would make the factor infinite.
  const float factor = divisor > 0.0 ? static_cast<float>(1.0 / divisor) : 0.0f;
  return {0.0f, std::isfinite(factor) ? factor : 0.0f};
}

}  // namespace

absl::Status NormalizeRows(CpuContext& context, Normalization normalization,
                           absl::Span<const Range> excluded, ScoreBuffer& x) {
  const int64_t cols = x.cols();
  int64_t least = 0;
  for (const Range& range : excluded) {
    if (range.begin < least || range.end < range.begin || range.end > cols) {
      return absl::InvalidArgumentError(absl::StrCat("normalize: excluded [", range.begin, ", ",
                                                     range.end, "), want ascending ranges within ",
                                                     least, "..", cols));
    }
    least = range.end;
  }
  float* data = x.data();
  context.ParallelFor(x.rows(), [&](int64_t r, int) {
    float* row = data + r * cols;
    const Scale scale = ScaleOf(normalization, row, cols, excluded);
    for (int64_t t = 0; t < cols; ++t) row[t] = (row[t] - scale.shift) * scale.factor;
  });
  return absl::OkStatus();
}

}  // namespace keepset::kernels::cpu
