// The risk gate of observation_heads: how many positions to keep for a wanted miss rate, and the
// miss rate to expect of a cut, both read off the curve that calibration found (the share of the
// score outside the cut against the share of prompts whose answer is lost).
#ifndef KEEPSET_ENGINE_POLICIES_OBSERVATION_RISK_H_
#define KEEPSET_ENGINE_POLICIES_OBSERVATION_RISK_H_

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/policies/policy_parameters.h"
#include "engine/policies/retention_policy.h"
#include "kernels/compute_backend.h"
#include "tables/observation_heads_table.h"

namespace keepset::engine {

struct RiskSettings {
  std::optional<double> target;  // wanted miss rate; absent: the budget is kept
  int64_t max_tokens = 0;        // most positions the gate may keep; 0: the budget
};

// Parameters risk_target and risk_max_tokens.
absl::StatusOr<RiskSettings> ReadRiskSettings(PolicyParameters& parameters);

// Whether the sets that are cut are those the curve was measured on: not when the request dilates
// once more, nor when groups of layers are merged into one set.
bool IsRiskKnown(const tables::ObservationHeadsTable& table, const PolicyContext& context);

// FailedPrecondition when a target is wanted of a table without a risk curve, InvalidArgument when
// the risk of the request's sets is not known, or the gate's most tokens do not hold the protected
// positions.
absl::Status CheckRiskSettings(const RiskSettings& settings,
                               const tables::ObservationHeadsTable& table,
                               const PolicyContext& context);

struct RiskOutcome {
  std::optional<int64_t> chosen;  // positions per set; absent: the budget
  std::optional<double> outside_mass;
  std::optional<double> predicted_miss_rate;
};

// Miss rate at `outside_mass`: linear between the points of `curve`, level beyond its ends.
double PredictMissRate(absl::Span<const tables::RiskPoint> curve, double outside_mass);

// Share of the positive part of `before` [T] that lies outside the first `count` positions of the
// order: protected ones, then by `after` [T] descending, ties to the lower position. Protected
// positions count in neither part; 1 when nothing else has a positive score.
//
// Adds one group of layers to `outcome`: with a target the most positions any group asks for, and
// the largest outside mass at the count that group asked for.
void AddGroupRisk(const RiskSettings& settings, absl::Span<const tables::RiskPoint> curve,
                  absl::Span<const float> before, absl::Span<const float> after,
                  absl::Span<const kernels::SelectArgs::Range> protected_ranges, int64_t budget,
                  RiskOutcome& outcome);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_POLICIES_OBSERVATION_RISK_H_
