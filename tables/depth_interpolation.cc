#include <algorithm>

#include "base/check.h"
#include "tables/decision_table.h"

namespace keepset::tables {

int64_t BinOf(absl::Span<const float> edges, double x) {
  // Edges are stored as F32: a value that equals an edge only after rounding belongs to the upper
  // bin, on every platform.
  const float rounded = static_cast<float>(x);
  return std::upper_bound(edges.begin(), edges.end(), rounded) - edges.begin();
}

std::vector<float> InterpolateDepth(absl::Span<const float> values, int64_t rows_in,
                                    int64_t row_size, int64_t rows_out) {
  KEEPSET_CHECK(rows_in >= 1 && rows_out >= 1 && values.size() == rows_in * row_size);
  std::vector<float> resampled(rows_out * row_size);
  for (int64_t row = 0; row < rows_out; ++row) {
    // Output row i lies at i * (rows_in - 1) / (rows_out - 1) input rows; kept as a whole part and
    // a remainder, so rows that coincide are copied exactly.
    const int64_t steps = std::max<int64_t>(rows_out - 1, 1);
    const int64_t position = row * (rows_in - 1);
    const int64_t low = position / steps;
    const int64_t high = std::min(low + 1, rows_in - 1);
    const double weight = static_cast<double>(position % steps) / static_cast<double>(steps);
    for (int64_t i = 0; i < row_size; ++i) {
      const double a = values[low * row_size + i];
      const double b = values[high * row_size + i];
      resampled[row * row_size + i] = static_cast<float>(a + (b - a) * weight);
    }
  }
  return resampled;
}

}  // namespace keepset::tables
