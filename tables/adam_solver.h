// The paper's optimiser for the same problem as cql_solver.h, for comparison: AdamW on a table of
// Q values that starts at 0, in batches drawn with replacement so that every state comes up equally
// often (methods.md 1.3). Deterministic for a seed, on every platform.
#ifndef KEEPSET_TABLES_ADAM_SOLVER_H_
#define KEEPSET_TABLES_ADAM_SOLVER_H_

#include <cstdint>
#include <vector>

#include "tables/cql_solver.h"
#include "tables/record_statistics.h"

namespace keepset::tables {

struct AdamOptions {
  double learning_rate = 3e-4;
  double weight_decay = 0.01;
  int64_t batch_size = 4096;
  int64_t epochs = 10;
  uint64_t seed = 42;
};

// `rows` name states below num_states, each at least once.
FittedStates FitByAdam(const std::vector<StateRow>& rows, int64_t num_states, int num_actions,
                       double conservative_weight, const AdamOptions& options);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_ADAM_SOLVER_H_
