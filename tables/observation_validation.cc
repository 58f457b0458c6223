#include "tables/observation_validation.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <tuple>
#include <utility>

namespace keepset::tables {
namespace {

// The fold of each prompt: the n-th of its task and length class goes to fold n mod folds. Where no
// class has as many prompts, that would leave folds empty and nothing to learn from: there the n-th
// of all.
std::vector<int64_t> FoldOf(absl::Span<const FitPrompt> prompts, int64_t folds) {
  std::map<std::pair<std::string, int64_t>, int64_t> seen;
  std::vector<int64_t> fold;
  fold.reserve(prompts.size());
  for (const FitPrompt& prompt : prompts) {
    fold.push_back(seen[{prompt.task, LengthClass(prompt.seq_len)}]++ % folds);
  }
  const bool is_full = std::find(fold.begin(), fold.end(), folds - 1) != fold.end();
  for (size_t p = 0; !is_full && p < fold.size(); ++p) fold[p] = static_cast<int64_t>(p) % folds;
  return fold;
}

std::vector<int64_t> TaskOf(absl::Span<const FitPrompt> prompts) {
  std::map<std::string, int64_t> tasks;
  for (const FitPrompt& prompt : prompts) tasks.emplace(prompt.task, 0);
  int64_t next = 0;
  for (auto& [task, index] : tasks) index = next++;
  std::vector<int64_t> of;
  of.reserve(prompts.size());
  for (const FitPrompt& prompt : prompts) of.push_back(tasks.at(prompt.task));
  return of;
}

RecallByTask MeanByTask(absl::Span<const FitPrompt> prompts, absl::Span<const double> values) {
  RecallByTask means;
  std::map<std::pair<std::string, int64_t>, double> counts;
  for (size_t p = 0; p < values.size(); ++p) {
    const int64_t length = LengthClass(prompts[p].seq_len);
    double& mean = means[prompts[p].task][length];
    mean += (values[p] - mean) / ++counts[{prompts[p].task, length}];
  }
  return means;
}

std::map<std::string, double> MeanOverLengths(const RecallByTask& recalls) {
  std::map<std::string, double> means;
  for (const auto& [task, lengths] : recalls) {
    double sum = 0.0;
    for (const auto& [length, recall] : lengths) sum += recall;
    means[task] = sum / static_cast<double>(lengths.size());
  }
  return means;
}

// [size - 1][prompt]: recall of each prompt by choices of that size from the prompts of other
// groups, up to the longest of these paths; a shorter one keeps its last choice.
std::vector<std::vector<double>> RecallsBySize(absl::Span<const FitPrompt> prompts,
                                               absl::Span<const int64_t> group_of,
                                               int64_t num_groups, const FitSettings& settings,
                                               const std::function<void()>& step) {
  std::vector<std::vector<double>> recalls(settings.max_heads,
                                           std::vector<double>(prompts.size(), 0.0));
  int64_t longest = 1;
  for (int64_t group = 0; group < num_groups; ++group) {
    std::vector<int64_t> train;
    std::vector<int64_t> test;
    for (size_t p = 0; p < prompts.size(); ++p) {
      (group_of[p] == group ? test : train).push_back(static_cast<int64_t>(p));
    }
    if (!test.empty() && !train.empty()) {
      const std::vector<Choice> path = GreedyPath(prompts, train, settings);
      longest = std::max(longest, static_cast<int64_t>(path.size()));
      for (int64_t size = 1; size <= settings.max_heads && !path.empty(); ++size) {
        const Choice& choice = path[std::min<size_t>(size, path.size()) - 1];
        for (const int64_t p : test) recalls[size - 1][p] = Recall(prompts[p], choice, settings);
      }
    }
    step();
  }
  recalls.resize(longest);
  return recalls;
}

int64_t BestSize(const Trial& trial) {
  const auto best = std::max_element(trial.recall_by_size.begin(), trial.recall_by_size.end());
  const double enough = *best - trial.error_by_size[best - trial.recall_by_size.begin()];
  int64_t chosen = 0;
  for (size_t i = 0; i < trial.recall_by_size.size(); ++i) {
    if (trial.recall_by_size[i] < enough) continue;
    const auto size = static_cast<int64_t>(i) + 1;
    if (trial.unseen_by_size.empty()) return size;
    const auto rank = [&](int64_t one) {
      const UnseenRecall& unseen = trial.unseen_by_size[one - 1];
      return std::tuple(unseen.worst, unseen.mean, one);
    };
    if (chosen == 0 || rank(size) > rank(chosen)) chosen = size;
  }
  return chosen;
}

}  // namespace

int64_t NumPaths(absl::Span<const ObservationRecord> records, int64_t folds) {
  std::set<std::string> tasks;
  for (const ObservationRecord& record : records) tasks.insert(record.task);
  return folds + (tasks.size() > 1 ? static_cast<int64_t>(tasks.size()) : 0);
}

Trial Validate(absl::Span<const FitPrompt> prompts, const FitSettings& settings,
               int64_t pool_kernel, int64_t folds, int64_t fixed_size,
               const std::function<void()>& step) {
  Trial trial;
  trial.pool_kernel = pool_kernel;
  trial.dilate = settings.dilate;
  std::vector<std::vector<double>> recalls =
      RecallsBySize(prompts, FoldOf(prompts, folds), folds, settings, step);
  std::vector<std::vector<double>> unseen;
  const std::vector<int64_t> task_of = TaskOf(prompts);
  const int64_t num_tasks = *std::max_element(task_of.begin(), task_of.end()) + 1;
  if (num_tasks > 1) unseen = RecallsBySize(prompts, task_of, num_tasks, settings, step);
  const size_t longest = std::max(recalls.size(), unseen.size());
  recalls.resize(longest, recalls.back());
  if (num_tasks > 1) unseen.resize(longest, unseen.back());

  const std::vector<double> shares = MixtureShares(prompts, Everyone(prompts.size()));
  for (const std::vector<double>& by_prompt : recalls) {
    const double mean = MixtureMean(shares, by_prompt);
    double squares = 0.0;
    for (const double value : by_prompt) squares += (value - mean) * (value - mean);
    trial.recall_by_size.push_back(mean);
    trial.error_by_size.push_back(std::sqrt(squares) / static_cast<double>(by_prompt.size()));
  }
  for (const std::vector<double>& by_prompt : unseen) {
    UnseenRecall one{.worst = 1.0, .mean = MixtureMean(shares, by_prompt)};
    for (const auto& [task, recall] : MeanOverLengths(MeanByTask(prompts, by_prompt))) {
      one.worst = std::min(one.worst, recall);
    }
    trial.unseen_by_size.push_back(one);
  }
  trial.chosen_size =
      fixed_size > 0 ? std::min(fixed_size, static_cast<int64_t>(longest)) : BestSize(trial);
  trial.recall_by_task = MeanByTask(prompts, recalls[trial.chosen_size - 1]);
  if (num_tasks > 1) {
    trial.unseen_recall_by_task =
        MeanOverLengths(MeanByTask(prompts, unseen[trial.chosen_size - 1]));
  }
  return trial;
}

Trial BestTrial(absl::Span<const Trial> trials) {
  const Trial* most = &trials[0];
  for (const Trial& one : trials) {
    if (one.chosen_recall() > most->chosen_recall()) most = &one;
  }
  if (most->unseen_by_size.empty()) return *most;
  const double enough = most->chosen_recall() - most->error_by_size[most->chosen_size - 1];
  const auto rank = [](const Trial& trial) {
    const UnseenRecall& unseen = trial.unseen_by_size[trial.chosen_size - 1];
    return std::tuple(unseen.worst, unseen.mean, trial.dilate);
  };
  const Trial* best = most;
  for (const Trial& one : trials) {
    if (one.chosen_recall() >= enough && rank(one) > rank(*best)) best = &one;
  }
  return *best;
}

}  // namespace keepset::tables
