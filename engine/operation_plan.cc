#include "engine/operation_plan.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/budget.h"
#include "engine/policies/policy_parameters.h"
#include "engine/spec_check.h"

namespace keepset::engine {

absl::StatusOr<OperationPlan> PlanOperation(OperationSpec spec, const PolicyRegistry& policies,
                                            kernels::ComputeBackend& backend) {
  OperationPlan plan;
  plan.spec = std::move(spec);
  KEEPSET_ASSIGN_OR_RETURN(const Scope native_scope, policies.NativeScope(plan.spec.policy));
  PolicyParameters parameters(plan.spec.policy, plan.spec.parameters);
  KEEPSET_ASSIGN_OR_RETURN(plan.policy, policies.New(plan.spec.policy, parameters));
  KEEPSET_ASSIGN_OR_RETURN(plan.cut_options,
                           ReadCutOptions(parameters, native_scope, *plan.policy));
  KEEPSET_RETURN_IF_ERROR(parameters.RefuseUnknown());
  plan.needs = plan.policy->requirements();
  KEEPSET_RETURN_IF_ERROR(CheckShape(plan.spec, plan.needs));
  KEEPSET_ASSIGN_OR_RETURN(plan.row_positions, ResolveRowPositions(plan.spec, plan.needs));
  KEEPSET_ASSIGN_OR_RETURN(plan.ppl, ResolvePerplexity(plan.spec));
  if (plan.needs.ppl && !plan.ppl.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("policy ", plan.spec.policy, ": missing ppl, want ppl or window_logprobs"));
  }
  KEEPSET_RETURN_IF_ERROR(CheckTable(plan.spec, plan.needs));
  plan.scope =
      plan.spec.scope.value_or(plan.policy->native_scope(plan.spec).value_or(native_scope));
  if (plan.policy->keeps_everything() && plan.spec.budget.kind == Budget::Kind::kTableDefault) {
    plan.budget_tokens = plan.spec.seq_len;
  } else {
    KEEPSET_ASSIGN_OR_RETURN(
        plan.budget_tokens,
        ResolveBudget(plan.spec, plan.needs.table_kind.empty() ? nullptr : plan.spec.table.get()));
  }
  KEEPSET_ASSIGN_OR_RETURN(plan.protected_ranges, ProtectedRanges(plan.spec));
  const int64_t protected_count = CountPositions(plan.protected_ranges);
  if (!plan.policy->keeps_everything() && protected_count > plan.budget_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(protected_count,
                                                   " protected positions, want at most the budget "
                                                   "of ",
                                                   plan.budget_tokens));
  }
  KEEPSET_ASSIGN_OR_RETURN(plan.op_context, backend.NewContext({plan.spec.device_stream}));
  return plan;
}

}  // namespace keepset::engine
