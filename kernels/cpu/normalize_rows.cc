// Rows of scores on a common scale. Statistics of a row are taken by one thread, in fp64, in the
// order of row_sums.h.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "base/status_macros.h"
#include "kernels/cpu/ops.h"
#include "kernels/op_checks.h"
#include "kernels/row_sums.h"

namespace keepset::kernels::cpu {
namespace {

// value -> (value - shift) * factor; factor 0 when the row has no scale.
struct Scale {
  float shift = 0.0f;
  float factor = 0.0f;
};

// Statistics over the included positions of rows of one shape.
class RowScales {
 public:
  RowScales(int64_t cols, absl::Span<const SelectArgs::Range> excluded)
      : is_included_(cols, 1), count_(cols) {
    for (const SelectArgs::Range& range : excluded) {
      std::fill(is_included_.begin() + range.begin, is_included_.begin() + range.end, 0);
      count_ -= range.end - range.begin;
    }
  }

  Scale Of(Normalization normalization, const float* row) const {
    switch (normalization) {
      case Normalization::kMax: {
        double largest = 0.0;
        for (int64_t t = 0; t < cols(); ++t) largest = std::max(largest, Value(row, t));
        return {0.0f, InverseOrZero(largest)};
      }
      case Normalization::kSum:
        return {0.0f, InverseOrZero(Sum(row))};
      case Normalization::kStandardize:
        break;
    }
    if (count_ == 0) return {};
    const double mean = Sum(row) / static_cast<double>(count_);
    const double squares = SumBlocks(cols(), [&](int64_t t) {
      return is_included_[t] != 0 ? (row[t] - mean) * (row[t] - mean) : 0.0;
    });
    const float factor = InverseOrZero(std::sqrt(squares / static_cast<double>(count_)));
    if (factor == 0.0f) return {};
    return {static_cast<float>(mean), factor};
  }

 private:
  int64_t cols() const { return static_cast<int64_t>(is_included_.size()); }
  double Value(const float* row, int64_t t) const { return is_included_[t] != 0 ? row[t] : 0.0; }
  double Sum(const float* row) const {
    return SumBlocks(cols(), [&](int64_t t) { return Value(row, t); });
  }

  std::vector<uint8_t> is_included_;
  int64_t count_;  // included positions
};

}  // namespace

absl::Status NormalizeRows(CpuContext& context, Normalization normalization,
                           absl::Span<const SelectArgs::Range> excluded, ScoreBuffer& x) {
  KEEPSET_RETURN_IF_ERROR(CheckNormalize(excluded, x));
  const int64_t cols = x.cols();
  float* data = x.data();
  const RowScales scales(cols, excluded);
  context.ParallelFor(x.rows(), [&](int64_t r, int) {
    float* row = data + r * cols;
    const Scale scale = scales.Of(normalization, row);
    for (int64_t t = 0; t < cols; ++t) row[t] = (row[t] - scale.shift) * scale.factor;
  });
  return absl::OkStatus();
}

}  // namespace keepset::kernels::cpu
