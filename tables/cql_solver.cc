#include "tables/cql_solver.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "tables/run_on_threads.h"

namespace keepset::tables {
namespace {

constexpr int kMaxIterations = 200;
constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// omega(u) = W(e^u), the root of w + ln w = u. Newton from the left on a concave function, so every
// step stays positive and below the root.
double WrightOmega(double u) {
  if (u < -700) return 0;  // e^u is the value to all digits, and underflows soon
  double w = u;
  if (u <= 1) {
    const double power = std::exp(u);
    w = power / (1 + power);
  } else {
    w -= std::log(u);
  }
  for (int i = 0; i < kMaxIterations; ++i) {
    const double step = (u - w - std::log(w)) * w / (1 + w);
    w += step;
    if (!(std::abs(step) > 1e-16 * w)) break;
  }
  return w;
}

}  // namespace

int ArgMax(absl::Span<const double> values) {
  return static_cast<int>(std::max_element(values.begin(), values.end()) - values.begin());
}

// With z = logsumexp(Q), p_a = exp(Q_a - z) solves ln p + c_a p = b_a - z, where c_a = lambda N /
// n_a and b_a = r_a + lambda: p_a(z) = omega(b_a - z + ln c_a) / c_a. Their sum decreases in z, is
// convex, and must be 1: Newton from z = max(b_a - c_a), where one p_a alone is 1, climbs to the
// root without overshooting it.
CqlSolution SolveCql(absl::Span<const int64_t> counts, absl::Span<const double> mean_rewards,
                     double conservative_weight) {
  const std::size_t num_actions = counts.size();
  CqlSolution solution;
  solution.q.assign(num_actions, kMinusInfinity);
  if (conservative_weight == 0) {
    for (std::size_t a = 0; a < num_actions; ++a) {
      if (counts[a] > 0) solution.q[a] = mean_rewards[a];
    }
    return solution;
  }
  double total = 0;
  // Q moves with a shift of all rewards; near 0 the equations lose the fewest digits.
  double shift = kMinusInfinity;
  for (std::size_t a = 0; a < num_actions; ++a) {
    total += static_cast<double>(counts[a]);
    if (counts[a] > 0) shift = std::max(shift, mean_rewards[a]);
  }
  std::vector<double> b(num_actions);
  std::vector<double> c(num_actions);
  double z = kMinusInfinity;
  for (std::size_t a = 0; a < num_actions; ++a) {
    if (counts[a] == 0) continue;
    b[a] = mean_rewards[a] - shift + conservative_weight;
    c[a] = conservative_weight * (total / static_cast<double>(counts[a]));
    z = std::max(z, b[a] - c[a]);
  }
  for (; solution.iterations < kMaxIterations; ++solution.iterations) {
    double sum = 0;
    double slope = 0;
    for (std::size_t a = 0; a < num_actions; ++a) {
      if (counts[a] == 0) continue;
      const double omega = WrightOmega(b[a] - z + std::log(c[a]));
      sum += omega / c[a];
      slope += omega / (c[a] * (1 + omega));
      solution.q[a] = b[a] - omega;
    }
    solution.residual = std::abs(sum - 1);
    if (solution.residual <= kCqlTolerance) break;
    const double next = z + (sum - 1) / slope;
    if (next == z) break;
    z = next;
  }
  for (double& value : solution.q) value += shift;
  return solution;
}

FittedStates SolveStates(const StateStatistics& states, double conservative_weight,
                         int num_threads) {
  const int64_t num_states = states.num_states();
  const int num_actions = states.num_actions();
  FittedStates fitted;
  fitted.actions.resize(num_states);
  fitted.q.resize(num_states * num_actions);
  std::vector<double> residuals(num_states);
  std::vector<int> iterations(num_states);
  std::atomic<int64_t> next = 0;
  constexpr int64_t kStatesPerTurn = 64;
  const int useful = static_cast<int>(std::clamp<int64_t>(num_states / kStatesPerTurn, 1, 1024));
  RunOnThreads(std::min(ThreadCount(num_threads), useful), [&](int) {
    for (int64_t first = next.fetch_add(kStatesPerTurn); first < num_states;
         first = next.fetch_add(kStatesPerTurn)) {
      const int64_t last = std::min(first + kStatesPerTurn, num_states);
      for (int64_t state = first; state < last; ++state) {
        const CqlSolution solution =
            SolveCql(states.counts(state), states.MeanRewards(state), conservative_weight);
        std::copy(solution.q.begin(), solution.q.end(), fitted.q.begin() + state * num_actions);
        fitted.actions[state] = ArgMax(solution.q);
        residuals[state] = solution.residual;
        iterations[state] = solution.iterations;
      }
    }
  });
  for (int64_t state = 0; state < num_states; ++state) {
    fitted.largest_residual = std::max(fitted.largest_residual, residuals[state]);
    fitted.most_iterations = std::max(fitted.most_iterations, iterations[state]);
  }
  return fitted;
}

}  // namespace keepset::tables
