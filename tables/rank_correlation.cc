#include "tables/rank_correlation.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "base/check.h"

namespace keepset::tables {
namespace {

// Ranks from 0; ties share their mean rank.
std::vector<double> MeanRanks(absl::Span<const float> values) {
  std::vector<std::size_t> order(values.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t x, std::size_t y) { return values[x] < values[y]; });
  std::vector<double> ranks(values.size());
  for (std::size_t first = 0; first < order.size();) {
    std::size_t end = first;
    while (end < order.size() && values[order[end]] == values[order[first]]) ++end;
    for (std::size_t i = first; i < end; ++i) {
      ranks[order[i]] = 0.5 * static_cast<double>(first + end - 1);
    }
    first = end;
  }
  return ranks;
}

int Sign(float x) { return (x > 0) - (x < 0); }

}  // namespace

std::optional<double> SpearmanCorrelation(absl::Span<const float> a, absl::Span<const float> b) {
  KEEPSET_CHECK(a.size() == b.size());
  const std::vector<double> x = MeanRanks(a);
  const std::vector<double> y = MeanRanks(b);
  // Mean ranks of n values average (n - 1) / 2, ties or not.
  const double mean = 0.5 * (static_cast<double>(a.size()) - 1);
  double xx = 0;
  double yy = 0;
  double xy = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    xx += (x[i] - mean) * (x[i] - mean);
    yy += (y[i] - mean) * (y[i] - mean);
    xy += (x[i] - mean) * (y[i] - mean);
  }
  if (xx == 0 || yy == 0) return std::nullopt;
  return std::clamp(xy / std::sqrt(xx * yy), -1.0, 1.0);
}

std::optional<double> KendallTau(absl::Span<const float> a, absl::Span<const float> b) {
  KEEPSET_CHECK(a.size() == b.size());
  int64_t agreement = 0;
  int64_t ranked_by_a = 0;
  int64_t ranked_by_b = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const int in_a = Sign(a[i] - a[j]);
      const int in_b = Sign(b[i] - b[j]);
      agreement += in_a * in_b;
      ranked_by_a += in_a * in_a;
      ranked_by_b += in_b * in_b;
    }
  }
  if (ranked_by_a == 0 || ranked_by_b == 0) return std::nullopt;
  return static_cast<double>(agreement) /
         std::sqrt(static_cast<double>(ranked_by_a) * static_cast<double>(ranked_by_b));
}

}  // namespace keepset::tables
