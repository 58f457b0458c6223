// From what a request calls its budget to positions per layer (formats.md "Budget of a request").
#ifndef KEEPSET_ENGINE_BUDGET_H_
#define KEEPSET_ENGINE_BUDGET_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "engine/operation_types.h"
#include "tables/decision_table.h"

namespace keepset::engine {

// Bytes of K and V of one position of one layer, over all KV heads.
int64_t TokenBytes(const OperationSpec& spec);

// Positions per layer as requested, before the clamp to seq_len; at least 1. `table` is the table
// the policy reads, nullptr when it reads none. InvalidArgument: a value out of range, or no budget
// and no table that states one.
absl::StatusOr<int64_t> ResolveBudget(const OperationSpec& spec,
                                      const tables::DecisionTable* table);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_BUDGET_H_
