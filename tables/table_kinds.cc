#include "tables/table_kinds.h"

namespace keepset::tables {

std::vector<TableKind> TableKinds() {
  return {
      {.name = "compilerkv",
       .keys = {"grid", "default_budget"},
       .tensors = {"head_weights", "gate_thresholds", "entropy_edges", "ppl_edges", "budgets"},
       .parse = ParseCompilerKvTable},
      {.name = "observation_heads",
       .keys = {"observation_heads", "default_budget"},
       .tensors = {"heads", "weights", "rows", "budgets"},
       .parse = ParseObservationHeadsTable},
  };
}

}  // namespace keepset::tables
