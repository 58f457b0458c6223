// How many observations a way to pool and dilate has, and which way: what held-out prompts and
// held-out tasks say. Private to tables/; observation_compiler.h is the way in.
#ifndef KEEPSET_TABLES_OBSERVATION_VALIDATION_H_
#define KEEPSET_TABLES_OBSERVATION_VALIDATION_H_

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "tables/observation_fit.h"
#include "tables/observation_record.h"

namespace keepset::tables {

// Mean recall of a task's prompts by their length class.
using RecallByLength = std::map<int64_t, double>;
using RecallByTask = std::map<std::string, RecallByLength>;

// Recall of tasks by observations that were chosen without any of their prompts.
struct UnseenRecall {
  double worst = 0.0;  // of the tasks
  double mean = 0.0;
};

// One way to pool and dilate, and what is known of every number of observations, [size - 1].
struct Trial {
  int64_t pool_kernel = 1;
  int64_t dilate = 0;
  std::vector<double> recall_by_size;        // of held-out prompts, tasks and lengths alike
  std::vector<double> error_by_size;         // standard error over prompts
  std::vector<UnseenRecall> unseen_by_size;  // empty where the prompts are of one task
  RecallByTask recall_by_task;               // of held-out prompts, at the chosen size
  std::map<std::string, double> unseen_recall_by_task;  // at the chosen size
  int64_t chosen_size = 0;

  double chosen_recall() const { return recall_by_size[chosen_size - 1]; }
};

// Steps of one Validate: folds, and tasks where there are two or more.
int64_t NumPaths(absl::Span<const ObservationRecord> records, int64_t folds);

// Of the sizes whose recall of held-out prompts is within one standard error of the best, the one
// with the largest recall of the worst held-out task; of equals the largest mean over these tasks,
// then the largest size. Where the prompts are of one task, the smallest of these sizes.
// fixed_size > 0: that size, or the last that is reached. step: called after every fold and task.
Trial Validate(absl::Span<const FitPrompt> prompts, const FitSettings& settings,
               int64_t pool_kernel, int64_t folds, int64_t fixed_size,
               const std::function<void()>& step);

// Chosen across trials as Validate chooses among sizes, of equals the wider dilation and then the
// first; where the prompts are of one task, the first of the largest recall.
Trial BestTrial(absl::Span<const Trial> trials);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_OBSERVATION_VALIDATION_H_
