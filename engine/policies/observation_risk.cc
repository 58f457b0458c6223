#include "engine/policies/observation_risk.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace keepset::engine {
namespace {

using Range = kernels::SelectArgs::Range;

// outside[n] = share of the mass outside the first n positions of the cut's order, n in 0..T.
std::vector<double> OutsideMass(absl::Span<const float> before, absl::Span<const float> after,
                                absl::Span<const Range> protected_ranges) {
  const auto seq_len = static_cast<int64_t>(before.size());
  std::vector<bool> is_protected(seq_len, false);
  int64_t num_protected = 0;
  for (const Range& range : protected_ranges) {
    for (int64_t t = range.begin; t < range.end; ++t) is_protected[t] = true;
    num_protected += range.end - range.begin;
  }
  std::vector<int32_t> order(seq_len);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    if (is_protected[a] != is_protected[b]) return bool{is_protected[a]};
    return !is_protected[a] && after[a] > after[b];
  });
  double total = 0.0;
  for (int64_t t = 0; t < seq_len; ++t) {
    if (!is_protected[t]) total += std::max(0.0f, before[t]);
  }
  std::vector<double> outside(seq_len + 1, 1.0);
  double inside = 0.0;
  for (int64_t n = 0; n < seq_len; ++n) {
    if (n >= num_protected) inside += std::max(0.0f, before[order[n]]);
    if (total > 0.0) outside[n + 1] = std::clamp(1.0 - inside / total, 0.0, 1.0);
  }
  return outside;
}

}  // namespace

absl::StatusOr<RiskSettings> ReadRiskSettings(PolicyParameters& parameters) {
  RiskSettings settings;
  KEEPSET_ASSIGN_OR_RETURN(settings.target, parameters.OptionalNumber("risk_target", 0.0, 1.0));
  KEEPSET_ASSIGN_OR_RETURN(
      settings.max_tokens,
      parameters.Int("risk_max_tokens", 0, 0, std::numeric_limits<int32_t>::max()));
  if (settings.max_tokens > 0 && !settings.target.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("policy observation_heads: parameter risk_max_tokens=", settings.max_tokens,
                     ", want risk_target beside it"));
  }
  return settings;
}

bool IsRiskKnown(const tables::ObservationHeadsTable& table, const PolicyContext& context) {
  const bool is_merged =
      context.scope == Scope::kSequence && table.settings().layer_groups.size() > 1;
  return context.dilate == 0 && !is_merged;
}

absl::Status CheckRiskSettings(const RiskSettings& settings,
                               const tables::ObservationHeadsTable& table,
                               const PolicyContext& context) {
  if (!settings.target.has_value()) return absl::OkStatus();
  const std::string what =
      absl::StrCat("parameter risk_target=", *settings.target, ": table ", table.identity().name);
  if (table.settings().risk_curve.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(what, " has no risk curve"));
  }
  if (context.dilate > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, " knows the risk of sets under its own dilation, want dilate=0, not ",
                     context.dilate));
  }
  if (!IsRiskKnown(table, context)) {
    return absl::InvalidArgumentError(
        absl::StrCat(what,
                     " knows the risk of its groups of layers apart, want scope layer_equal, "
                     "not sequence"));
  }
  int64_t num_protected = 0;
  for (const Range& range : context.protected_ranges) num_protected += range.end - range.begin;
  if (settings.max_tokens > 0 && settings.max_tokens < num_protected) {
    return absl::InvalidArgumentError(
        absl::StrCat("parameter risk_max_tokens=", settings.max_tokens, ", want at least the ",
                     num_protected, " protected positions"));
  }
  return absl::OkStatus();
}

double PredictMissRate(absl::Span<const tables::RiskPoint> curve, double outside_mass) {
  if (outside_mass <= curve.front().outside_mass) return curve.front().miss_rate;
  for (size_t i = 1; i < curve.size(); ++i) {
    const tables::RiskPoint& low = curve[i - 1];
    const tables::RiskPoint& high = curve[i];
    if (outside_mass > high.outside_mass) continue;
    const double share = (outside_mass - low.outside_mass) / (high.outside_mass - low.outside_mass);
    return low.miss_rate + share * (high.miss_rate - low.miss_rate);
  }
  return curve.back().miss_rate;
}

void AddGroupRisk(const RiskSettings& settings, absl::Span<const tables::RiskPoint> curve,
                  absl::Span<const float> before, absl::Span<const float> after,
                  absl::Span<const Range> protected_ranges, int64_t budget, RiskOutcome& outcome) {
  const auto seq_len = static_cast<int64_t>(before.size());
  const std::vector<double> outside = OutsideMass(before, after, protected_ranges);
  int64_t count = std::min(budget, seq_len);
  if (settings.target.has_value()) {
    int64_t least = 1;
    for (const Range& range : protected_ranges) least += range.end - range.begin;
    const int64_t most = std::min(settings.max_tokens > 0 ? settings.max_tokens : budget, seq_len);
    count = std::min(least, most);
    while (count < most && PredictMissRate(curve, outside[count]) > *settings.target) ++count;
    outcome.chosen = std::max(outcome.chosen.value_or(0), count);
  }
  outcome.outside_mass = std::max(outcome.outside_mass.value_or(0.0), outside[count]);
  outcome.predicted_miss_rate = PredictMissRate(curve, *outcome.outside_mass);
}

}  // namespace keepset::engine
