#include "tables/table_kinds.h"

namespace keepset::tables {

std::vector<TableKind> TableKinds() {
  return {
      {.name = "compilerkv",
       .keys = {"grid", "default_budget"},
       .tensors = {"head_weights", "gate_thresholds", "entropy_edges", "ppl_edges", "budgets"},
       .parse = ParseCompilerKvTable},
  };
}

}  // namespace keepset::tables
