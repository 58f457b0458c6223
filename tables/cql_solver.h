// The exact optimum of horizon-1 conservative Q-learning, one convex problem per state
// (methods.md 1.3):
//
//   minimise  lambda * mean[logsumexp_a Q(a) - Q(a_log)] + 1/2 mean[(Q(a_log) - r)^2]
//
// With n_a records of action a, N in all and mean rewards r_a, the optimum satisfies
// Q(a) = r_a + lambda - lambda * N * softmax(Q)_a / n_a. An action that was never logged goes to
// minus infinity and is never chosen.
#ifndef KEEPSET_TABLES_CQL_SOLVER_H_
#define KEEPSET_TABLES_CQL_SOLVER_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "tables/record_statistics.h"

namespace keepset::tables {

// |sum_a softmax(Q)_a - 1| of a solution, the only equation that is solved by iteration. Where the
// rewards of a state lie thousands apart doubles end a little above; the residual says so.
inline constexpr double kCqlTolerance = 1e-12;

struct CqlSolution {
  std::vector<double> q;  // [num_actions]; -infinity for actions never logged
  double residual = 0;    // |sum_a softmax(Q)_a - 1|
  int iterations = 0;
};

// counts, mean_rewards: [num_actions]; at least one count is positive. conservative_weight >= 0.
CqlSolution SolveCql(absl::Span<const int64_t> counts, absl::Span<const double> mean_rewards,
                     double conservative_weight);

// Index of the largest value; the first one wins ties.
int ArgMax(absl::Span<const double> values);

struct FittedStates {
  std::vector<int> actions;     // [num_states], the chosen ones
  std::vector<double> q;        // [num_states, num_actions]
  double largest_residual = 0;  // exact solver
  int most_iterations = 0;      // exact solver
};

// Every state by SolveCql; the same bits for any number of threads (0: all cores).
FittedStates SolveStates(const StateStatistics& states, double conservative_weight,
                         int num_threads);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_CQL_SOLVER_H_
