#include "tables/cql_solver.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "tables/adam_solver.h"

namespace keepset::tables {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kPaperWeight = 0.75;

struct Problem {
  std::vector<int64_t> counts;
  std::vector<double> means;
};

double ObjectiveAt(const Problem& problem, const std::vector<double>& q, double weight) {
  double total = 0;
  for (const int64_t count : problem.counts) total += count;
  double sum = 0;
  for (const double value : q) sum += std::exp(value);
  double objective = weight * std::log(sum);
  for (std::size_t a = 0; a < q.size(); ++a) {
    const double share = problem.counts[a] / total;
    if (share == 0) continue;
    const double error = q[a] - problem.means[a];
    objective += share * (error * error / 2 - weight * q[a]);
  }
  return objective;
}

// Plain gradient descent; logged actions only, the others being at minus infinity.
std::vector<double> Descend(const Problem& problem, double weight) {
  double total = 0;
  for (const int64_t count : problem.counts) total += count;
  std::vector<double> q(problem.counts.size(), -kInfinity);
  for (std::size_t a = 0; a < q.size(); ++a) {
    if (problem.counts[a] > 0) q[a] = 0;
  }
  for (int step = 0; step < 400000; ++step) {
    double sum = 0;
    for (const double value : q) sum += std::exp(value);
    for (std::size_t a = 0; a < q.size(); ++a) {
      const double share = problem.counts[a] / total;
      if (share == 0) continue;
      const double gradient =
          weight * std::exp(q[a]) / sum + share * (q[a] - problem.means[a] - weight);
      q[a] -= 0.5 * gradient;
    }
  }
  return q;
}

Problem RandomProblem(std::mt19937_64& random, int num_actions) {
  Problem problem;
  for (int a = 0; a < num_actions; ++a) {
    problem.counts.push_back(static_cast<int64_t>(random() % 5));
    problem.means.push_back(static_cast<double>(random() % 2001) / 1000 - 1);
  }
  problem.counts[0] += 1;
  return problem;
}

TEST(CqlSolver, PicksTheRewardedActionOfTheReferenceExample) {
  const CqlSolution solution =
      SolveCql(std::vector<int64_t>{1, 1, 0}, std::vector<double>{-1, 1, 0}, kPaperWeight);
  EXPECT_EQ(ArgMax(solution.q), 1);
  EXPECT_EQ(solution.q[2], -kInfinity);
}

TEST(CqlSolver, FindsTheOptimumThatGradientDescentFinds) {
  std::mt19937_64 random(7);
  // Descent has converged to about this.
  constexpr double kDescentError = 1e-9;
  for (int i = 0; i < 6; ++i) {
    const Problem problem = RandomProblem(random, 5);
    const double weight = i % 2 == 0 ? kPaperWeight : 0.1;
    const CqlSolution solution = SolveCql(problem.counts, problem.means, weight);
    const std::vector<double> descended = Descend(problem, weight);
    for (std::size_t a = 0; a < problem.counts.size(); ++a) {
      if (problem.counts[a] == 0) {
        EXPECT_EQ(solution.q[a], -kInfinity);
      } else {
        EXPECT_NEAR(solution.q[a], descended[a], kDescentError) << i << " " << a;
      }
    }
  }
}

TEST(CqlSolver, NoNearbyPointIsBetter) {
  std::mt19937_64 random(11);
  for (int i = 0; i < 200; ++i) {
    const Problem problem = RandomProblem(random, 29);
    const CqlSolution solution = SolveCql(problem.counts, problem.means, kPaperWeight);
    const double optimum = ObjectiveAt(problem, solution.q, kPaperWeight);
    for (std::size_t a = 0; a < solution.q.size(); ++a) {
      for (const double step : {-1e-3, 1e-3}) {
        std::vector<double> moved = solution.q;
        moved[a] += step;
        if (problem.counts[a] > 0) {
          EXPECT_GT(ObjectiveAt(problem, moved, kPaperWeight), optimum);
        }
      }
    }
  }
}

TEST(CqlSolver, ReachesItsToleranceOnHardCounts) {
  std::mt19937_64 random(13);
  for (int i = 0; i < 500; ++i) {
    Problem problem;
    for (int a = 0; a < 29; ++a) {
      problem.counts.push_back(static_cast<int64_t>(random() % 3 == 0 ? random() % 10000000 : 1));
      problem.means.push_back(std::ldexp(static_cast<double>(random() % 2001) - 1000,
                                         static_cast<int>(random() % 16) - 20));
    }
    const double weight = std::ldexp(1.0, static_cast<int>(random() % 10) - 8);
    const CqlSolution solution = SolveCql(problem.counts, problem.means, weight);
    EXPECT_LE(solution.residual, kCqlTolerance);
    EXPECT_LT(solution.iterations, 100);
  }
}

TEST(CqlSolver, WithoutConservatismTheValuesAreTheMeans) {
  const CqlSolution solution =
      SolveCql(std::vector<int64_t>{3, 0, 1}, std::vector<double>{0.5, 9, -2}, 0);
  EXPECT_EQ(solution.q, (std::vector<double>{0.5, -kInfinity, -2}));
}

TEST(CqlSolver, OneLoggedActionIsChosenWhateverItsReward) {
  const CqlSolution solution =
      SolveCql(std::vector<int64_t>{0, 4, 0}, std::vector<double>{0, -1000, 0}, kPaperWeight);
  EXPECT_EQ(ArgMax(solution.q), 1);
  // With a softmax of 1 the two conservative terms cancel.
  EXPECT_NEAR(solution.q[1], -1000, 1e-9);
}

TEST(CqlSolver, TheFirstOfEqualActionsWins) {
  const CqlSolution solution = SolveCql(std::vector<int64_t>{2, 5, 5, 5},
                                        std::vector<double>{0, 0.3, 0.3, 0.3}, kPaperWeight);
  EXPECT_EQ(ArgMax(solution.q), 1);
}

TEST(CqlSolver, UnequalCountsFavourTheActionLoggedMore) {
  const CqlSolution solution =
      SolveCql(std::vector<int64_t>{1, 100}, std::vector<double>{0.1, 0.0}, kPaperWeight);
  EXPECT_EQ(ArgMax(solution.q), 1);
}

StateStatistics RandomStates(int num_states, std::vector<StateRow>* rows) {
  StateStatistics states(kGateActions.size, 1 << 20);
  std::mt19937_64 random(3);
  for (int state = 0; state < num_states; ++state) {
    for (int i = 0; i < 400; ++i) {
      const int action = i % kGateActions.size;
      const double reward = -2.0 * std::min(3, std::abs(action - state % kGateActions.size)) +
                            static_cast<double>(random() % 101) / 1000;
      EXPECT_EQ(states.Add({64, 0, state}, action, reward).value(), state);
      if (rows != nullptr) {
        rows->push_back({reward, static_cast<uint32_t>(state), static_cast<uint8_t>(action)});
      }
    }
  }
  return states;
}

TEST(SolveStates, IsTheSameForAnyNumberOfThreads) {
  const StateStatistics states = RandomStates(300, nullptr);
  const FittedStates one = SolveStates(states, kPaperWeight, 1);
  for (const int threads : {2, 3, 8}) {
    const FittedStates many = SolveStates(states, kPaperWeight, threads);
    EXPECT_EQ(many.q, one.q);
    EXPECT_EQ(many.actions, one.actions);
  }
}

TEST(AdamSolver, AgreesWithTheExactOptimumOnClearData) {
  std::vector<StateRow> rows;
  const StateStatistics states = RandomStates(10, &rows);
  AdamOptions options;
  options.learning_rate = 0.01;
  options.batch_size = 512;
  options.epochs = 200;
  const FittedStates adam =
      FitByAdam(rows, states.num_states(), states.num_actions(), kPaperWeight, options);
  EXPECT_EQ(adam.actions, SolveStates(states, kPaperWeight, 1).actions);
}

TEST(AdamSolver, PicksTheRewardedActionOfTheReferenceExample) {
  AdamOptions options;
  options.learning_rate = 0.1;
  options.epochs = 100;
  const FittedStates adam = FitByAdam({{-1, 0, 0}, {1, 0, 1}}, 1, 3, kPaperWeight, options);
  EXPECT_EQ(adam.actions, std::vector<int>{1});
}

TEST(AdamSolver, FirstStepMovesEveryValueByTheLearningRate) {
  AdamOptions options;
  options.epochs = 1;
  const FittedStates adam = FitByAdam({{5, 0, 1}}, 1, 3, kPaperWeight, options);
  // Bias-corrected, the first step is lr * sign(gradient) up to epsilon.
  EXPECT_NEAR(adam.q[0], -options.learning_rate, 1e-10);
  EXPECT_NEAR(adam.q[1], options.learning_rate, 1e-10);
  EXPECT_NEAR(adam.q[2], -options.learning_rate, 1e-10);
}

TEST(AdamSolver, SameSeedSameBits) {
  std::vector<StateRow> rows;
  RandomStates(3, &rows);
  AdamOptions options;
  options.batch_size = 64;
  EXPECT_EQ(FitByAdam(rows, 3, kGateActions.size, kPaperWeight, options).q,
            FitByAdam(rows, 3, kGateActions.size, kPaperWeight, options).q);
  AdamOptions other = options;
  other.seed = 43;
  EXPECT_NE(FitByAdam(rows, 3, kGateActions.size, kPaperWeight, options).q,
            FitByAdam(rows, 3, kGateActions.size, kPaperWeight, other).q);
}

}  // namespace
}  // namespace keepset::tables
