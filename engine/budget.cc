#include "engine/budget.h"

#include <algorithm>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace keepset::engine {

int64_t TokenBytes(const OperationSpec& spec) {
  const int64_t value_head_dim =
      spec.value_head_dim == 0 ? spec.model.head_dim : spec.value_head_dim;
  return spec.model.num_kv_heads * (spec.model.head_dim + value_head_dim) *
         kernels::DTypeBytes(spec.kv_dtype);
}

absl::StatusOr<int64_t> ResolveBudget(const OperationSpec& spec,
                                      const tables::DecisionTable* table) {
  const Budget& budget = spec.budget;
  switch (budget.kind) {
    case Budget::Kind::kTokens:
      if (budget.tokens < 1) {
        return absl::InvalidArgumentError(
            absl::StrCat("budget_tokens=", budget.tokens, ", want 1 or more"));
      }
      return budget.tokens;
    case Budget::Kind::kKeptFraction: {
      const double fraction = budget.kept_fraction;
      if (!(fraction > 0.0 && fraction <= 1.0)) {
        return absl::InvalidArgumentError(
            absl::StrCat("kept_fraction=", fraction, ", want above 0 and at most 1"));
      }
      const double tokens = std::floor(static_cast<double>(spec.seq_len) * fraction);
      return std::max<int64_t>(1, static_cast<int64_t>(tokens));
    }
    case Budget::Kind::kBytes: {
      const int64_t token_bytes = TokenBytes(spec);
      if (budget.bytes < token_bytes) {
        return absl::InvalidArgumentError(absl::StrCat("budget_bytes=", budget.bytes,
                                                       ", want at least ", token_bytes,
                                                       ", K and V of one position of one layer"));
      }
      return budget.bytes / token_bytes;
    }
    case Budget::Kind::kTableDefault: {
      if (table == nullptr) {
        return absl::InvalidArgumentError(
            absl::StrCat("policy ", spec.policy,
                         ": no budget and no table that states one, want tokens, kept_fraction or "
                         "bytes"));
      }
      return table->DefaultBudget();
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("budget kind ", static_cast<int>(budget.kind),
                   ", want table default, tokens, kept_fraction or bytes"));
}

}  // namespace keepset::engine
