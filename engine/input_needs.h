// What a worker has to send for an operation, so that it hooks and copies nothing else.
#ifndef KEEPSET_ENGINE_INPUT_NEEDS_H_
#define KEEPSET_ENGINE_INPUT_NEEDS_H_

#include <string>

#include "absl/status/statusor.h"
#include "engine/operation_types.h"
#include "engine/policies/policy_registry.h"

namespace keepset::engine {

// Of `spec` only model, policy, parameters and table are looked at. Errors are those of
// Operation::Begin for these fields.
absl::StatusOr<InputNeeds> DescribeNeeds(const OperationSpec& spec, const PolicyRegistry& policies);

// One JSON document: {"layers": [{"layer": 5, "queries": true, "keys": true, "values": false,
// "columns": false, "qo_heads": [3], "kv_heads": [0]}], "rows": ["last_row", "observed_rows",
// "probe_rows"], "max_rows": 0, "ppl": false, "probe": {"name": .., "text": ..} or null}. Empty
// head lists mean all heads.
std::string InputNeedsJson(const InputNeeds& needs);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_INPUT_NEEDS_H_
