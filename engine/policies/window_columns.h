// The observation stage of every policy that scores by attention: rows to column mass.
#ifndef KEEPSET_ENGINE_POLICIES_WINDOW_COLUMNS_H_
#define KEEPSET_ENGINE_POLICIES_WINDOW_COLUMNS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "engine/operation_types.h"
#include "engine/policies/retention_policy.h"
#include "kernels/compute_backend.h"

namespace keepset::engine {

// columns[h, t] = mean over the last `num_rows` observed rows of the attention on t; out: [H, T].
// A tile wins over queries; a given log-sum-exp is used with queries. Column statistics are those
// of exactly `num_rows` rows. 1 <= num_rows <= W.
// value_norms (may be null): [Hkv, T], receives the norms of the observation's v.
absl::Status WindowColumnMeans(PolicyContext& context, int64_t layer,
                               const LayerObservation& observation, int64_t num_rows,
                               kernels::ScoreBuffer& columns,
                               kernels::ScoreBuffer* value_norms = nullptr);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_POLICIES_WINDOW_COLUMNS_H_
