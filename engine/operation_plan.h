// What a spec asks for, checked and resolved, before any layer comes.
#ifndef KEEPSET_ENGINE_OPERATION_PLAN_H_
#define KEEPSET_ENGINE_OPERATION_PLAN_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/cut.h"
#include "engine/operation_types.h"
#include "engine/policies/policy_registry.h"
#include "engine/policies/retention_policy.h"
#include "engine/protection.h"
#include "kernels/compute_backend.h"

namespace keepset::engine {

struct OperationPlan {
  OperationSpec spec;
  std::unique_ptr<RetentionPolicy> policy;  // not begun
  std::unique_ptr<kernels::OpContext> op_context;
  Requirements needs;
  Scope scope = Scope::kLayerEqual;
  int64_t budget_tokens = 0;           // as requested, before the clamp to T
  std::vector<int64_t> row_positions;  // [W]
  std::optional<double> ppl;
  CutOptions cut_options;
  PositionRanges protected_ranges;
};

// Checks everything that Operation::Begin promises to check, but for what the policy looks at when
// it begins; with the same errors.
absl::StatusOr<OperationPlan> PlanOperation(OperationSpec spec, const PolicyRegistry& policies,
                                            kernels::ComputeBackend& backend);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_OPERATION_PLAN_H_
