// How well two lists rank alike. Ties share a rank. nullopt when one side ranks nothing: fewer than
// two values, or all of them equal.
#ifndef KEEPSET_TABLES_RANK_CORRELATION_H_
#define KEEPSET_TABLES_RANK_CORRELATION_H_

#include <optional>

#include "absl/types/span.h"

namespace keepset::tables {

// Both take lists of one length without NaN.

// Pearson's correlation of the ranks, -1..1.
std::optional<double> SpearmanCorrelation(absl::Span<const float> a, absl::Span<const float> b);

// Kendall's tau-b, -1..1, from all pairs: the time grows with the square of the length.
std::optional<double> KendallTau(absl::Span<const float> a, absl::Span<const float> b);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_RANK_CORRELATION_H_
