// Which observations to keep, and with what weights: greedy forward selection with a convex refit,
// deterministic. Private to tables/; observation_compiler.h is the way in.
//
// The objective of a choice is recall: the share of the needed mass of a prompt that lies on the
// positions kept at a budget, protected ones aside. Tasks count alike whatever the number of their
// prompts, and so do the lengths of a task.
#ifndef KEEPSET_TABLES_OBSERVATION_FIT_H_
#define KEEPSET_TABLES_OBSERVATION_FIT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "tables/observation_record.h"

namespace keepset::tables {

// A record made ready for one way of pooling and normalising.
struct FitPrompt {
  std::string task;
  int64_t seq_len = 0;
  std::vector<float> columns;      // [N, T]
  std::vector<double> need;        // [T], 0 at protected positions
  double total_need = 0.0;         // above 0
  std::vector<bool> is_protected;  // [T]
  int64_t num_protected = 0;
};

// As the policy computes its columns (engine/policies/observation_heads_policy.cc).
FitPrompt PreparePrompt(const ObservationRecord& record, int64_t pool_kernel,
                        ObservationNormalization normalization);

// The power of two nearest to seq_len (at least 1), in the logarithm: prompts of the same class
// count as equally long.
int64_t LengthClass(int64_t seq_len);

// What each prompt of `which` counts in the objective, [which]: every task the same, every length
// class of a task the same, every prompt of a class the same; the sum is 1.
std::vector<double> MixtureShares(absl::Span<const FitPrompt> prompts,
                                  absl::Span<const int64_t> which);

// Sum of shares times values, both [n].
double MixtureMean(absl::Span<const double> shares, absl::Span<const double> values);

// 0, 1, .., count - 1.
std::vector<int64_t> Everyone(size_t count);

struct FitSettings {
  std::vector<int64_t> budgets;  // recall is averaged over them
  int64_t dilate = 0;
  int64_t max_heads = 16;
  int num_threads = 0;  // 0: all cores this process may use
};

// Weights by candidate; others are 0.
struct Choice {
  std::vector<int64_t> candidates;  // in order of selection
  std::vector<double> weights;      // parallel; the largest is 1
};

// Recall of one prompt under scores [T] that are dilated here.
double Recall(const FitPrompt& prompt, absl::Span<const float> scores, const FitSettings& settings);
// Of one prompt under a choice.
double Recall(const FitPrompt& prompt, const Choice& choice, const FitSettings& settings);
// Of prompts `which`, by their MixtureShares.
double MeanRecall(absl::Span<const FitPrompt> prompts, absl::Span<const int64_t> which,
                  const Choice& choice, const FitSettings& settings);

// Weights of `candidates`, parallel: non-negative least squares of the needed mass, each prompt's
// scaled to a maximum of 1, on their columns outside protected positions. Prompts count by their
// MixtureShares. A ridge of a thousandth of the mean squared column keeps nearly equal ones apart.
std::vector<double> RefitWeights(absl::Span<const FitPrompt> prompts,
                                 absl::Span<const int64_t> which,
                                 const std::vector<int64_t>& candidates);

// The choices of 1, 2, .. observations, each the one before with the observation that raises the
// objective most (ties to the lower candidate) and weights refitted by non-negative least squares
// where that is better. Where none raises it, the next is the best by itself of those that do not
// lower it and are better than candidates usually are: what these prompts do not need may be what
// other tasks do. Ends when there is none, or at max_heads.
std::vector<Choice> GreedyPath(absl::Span<const FitPrompt> prompts, absl::Span<const int64_t> which,
                               const FitSettings& settings);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_OBSERVATION_FIT_H_
