#include "tables/observation_compiler.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "tables/observation_fit.h"
#include "tables/observation_record.h"
#include "tables/observation_validation.h"
#include "tables/strict_json.h"

namespace keepset::tables {
namespace {

using OrderedJson = nlohmann::ordered_json;

constexpr int kShuffles = 20;
constexpr uint64_t kShuffleSeed = 1;
constexpr int64_t kMaxHeads = 4096;

absl::Status CheckOptions(const ObservationCompileOptions& options) {
  const auto refuse = [](absl::string_view name, int64_t value, absl::string_view want) {
    return absl::InvalidArgumentError(absl::StrCat(name, "=", value, ", want ", want));
  };
  if (options.budgets.empty()) {
    return absl::InvalidArgumentError("budgets: none, want at least one");
  }
  for (const int64_t budget : options.budgets) {
    if (budget < 1 || budget > INT32_MAX) return refuse("budgets", budget, "1..2147483647");
  }
  for (const int64_t kernel : options.pool_kernels) {
    if (kernel < 1 || kernel > 1023 || kernel % 2 == 0) {
      return refuse("pool_kernels", kernel, "odd numbers in 1..1023");
    }
  }
  for (const int64_t dilate : options.dilations) {
    if (dilate < 0 || dilate > 4096) return refuse("dilations", dilate, "0..4096");
  }
  if (options.pool_kernels.empty() || options.dilations.empty()) {
    return absl::InvalidArgumentError("pool_kernels and dilations: want at least one of each");
  }
  if (options.max_heads < 1 || options.max_heads > kMaxHeads) {
    return refuse("max_heads", options.max_heads, absl::StrCat("1..", kMaxHeads));
  }
  if (options.num_heads < 0 || options.num_heads > options.max_heads) {
    return refuse("num_heads", options.num_heads,
                  absl::StrCat("0 (validated) or 1..", options.max_heads));
  }
  if (options.num_folds < 2 || options.num_folds > 1000) {
    return refuse("num_folds", options.num_folds, "2..1000");
  }
  return absl::OkStatus();
}

// Whether any need lies outside protected positions, which are no choice of a policy's. Sums and
// differences of what is protected would leave their rounding.
bool NeedsUnprotected(const ObservationRecord& record) {
  int64_t begin = 0;
  const auto is_needed = [](float value) { return value > 0.0f; };
  for (const LayerGroup& range : record.protected_ranges) {
    if (std::any_of(record.need.begin() + begin, record.need.begin() + range.begin, is_needed)) {
      return true;
    }
    begin = range.end;
  }
  return std::any_of(record.need.begin() + begin, record.need.end(), is_needed);
}

// Ordered by task and prompt, so that the order of the files is no input.
absl::StatusOr<std::vector<ObservationRecord>> ReadRecords(const std::vector<std::string>& paths) {
  std::vector<ObservationRecord> records;
  for (const std::string& path : paths) {
    KEEPSET_ASSIGN_OR_RETURN(ObservationRecord record, ReadObservationRecord(path));
    if (!records.empty()) {
      const ObservationRecord& first = records.front();
      if (record.model != first.model) {
        return absl::InvalidArgumentError(
            absl::StrCat(path, ": model differs from that of ", paths.front()));
      }
      if (record.candidates != first.candidates || record.probe != first.probe) {
        return absl::InvalidArgumentError(
            absl::StrCat(path, ": candidates or probe differ from those of ", paths.front()));
      }
    }
    if (!NeedsUnprotected(record)) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": no needed mass outside protected positions"));
    }
    records.push_back(std::move(record));
  }
  std::sort(records.begin(), records.end(),
            [](const ObservationRecord& a, const ObservationRecord& b) {
              return std::tie(a.task, a.prompt_id) < std::tie(b.task, b.prompt_id);
            });
  for (size_t i = 1; i < records.size(); ++i) {
    if (records[i].prompt_id == records[i - 1].prompt_id &&
        records[i].task == records[i - 1].task) {
      return absl::InvalidArgumentError(absl::StrCat("prompt ", records[i].prompt_id, " of task ",
                                                     records[i].task, " is recorded twice"));
    }
  }
  return records;
}

std::vector<FitPrompt> Prepare(const std::vector<ObservationRecord>& records, int64_t pool_kernel,
                               ObservationNormalization normalization) {
  std::vector<FitPrompt> prompts;
  prompts.reserve(records.size());
  for (const ObservationRecord& record : records) {
    prompts.push_back(PreparePrompt(record, pool_kernel, normalization));
  }
  return prompts;
}

double MeanOf(const RecallByLength& lengths) {
  double sum = 0.0;
  for (const auto& [length, recall] : lengths) sum += recall;
  return sum / static_cast<double>(lengths.size());
}

// Mean recall of the choice's weights on observations drawn at random: the control that shows that
// it matters which observations carry them. std::mt19937_64 is the same everywhere, its
// distributions are not.
double ShuffledRecall(const std::vector<FitPrompt>& prompts, const Choice& choice,
                      int64_t num_candidates, const FitSettings& settings) {
  std::mt19937_64 random(kShuffleSeed);
  double sum = 0.0;
  for (int i = 0; i < kShuffles; ++i) {
    std::vector<int64_t> order = Everyone(num_candidates);
    for (int64_t j = num_candidates - 1; j > 0; --j) {
      std::swap(order[j], order[static_cast<int64_t>(random() % static_cast<uint64_t>(j + 1))]);
    }
    Choice shuffled = choice;
    std::copy_n(order.begin(), choice.candidates.size(), shuffled.candidates.begin());
    sum += MeanRecall(prompts, Everyone(prompts.size()), shuffled, settings);
  }
  return sum / kShuffles;
}

// The most that any set of this size can hold.
double OracleRecall(const std::vector<FitPrompt>& prompts, const FitSettings& settings) {
  FitSettings undilated = settings;
  undilated.dilate = 0;
  std::vector<double> recalls;
  for (const FitPrompt& prompt : prompts) {
    const std::vector<float> need(prompt.need.begin(), prompt.need.end());
    recalls.push_back(Recall(prompt, need, undilated));
  }
  return MixtureMean(MixtureShares(prompts, Everyone(prompts.size())), recalls);
}

OrderedJson TrialJson(const Trial& trial) {
  OrderedJson json = {{"pool_kernel", trial.pool_kernel},
                      {"dilate", trial.dilate},
                      {"num_heads", trial.chosen_size},
                      {"held_out_recall", trial.chosen_recall()},
                      {"held_out_recall_by_num_heads", trial.recall_by_size},
                      {"standard_error_by_num_heads", trial.error_by_size}};
  if (!trial.unseen_by_size.empty()) {
    OrderedJson worst = OrderedJson::array();
    OrderedJson mean = OrderedJson::array();
    for (const UnseenRecall& one : trial.unseen_by_size) {
      worst.push_back(one.worst);
      mean.push_back(one.mean);
    }
    json["worst_unseen_task_recall"] = trial.unseen_by_size[trial.chosen_size - 1].worst;
    json["worst_unseen_task_recall_by_num_heads"] = worst;
    json["unseen_task_recall_by_num_heads"] = mean;
  }
  return json;
}

struct Fitted {
  Trial trial;
  Choice choice;
  std::vector<FitPrompt> prompts;
  FitSettings settings;
  OrderedJson trials = OrderedJson::array();
};

absl::StatusOr<Fitted> Fit(const std::vector<ObservationRecord>& records,
                           const ObservationCompileOptions& options,
                           const CompileProgress& progress) {
  Fitted fitted;
  fitted.settings.budgets = options.budgets;
  fitted.settings.max_heads =
      std::min<int64_t>(options.max_heads, static_cast<int64_t>(records[0].candidates.size()));
  fitted.settings.num_threads = options.num_threads;
  const int64_t ways = static_cast<int64_t>(options.pool_kernels.size() * options.dilations.size());
  const int64_t total = ways * NumPaths(records, options.num_folds);
  int64_t done = 0;
  const auto step = [&] {
    ++done;
    if (progress) progress(done, total);
  };
  std::vector<Trial> trials;
  for (const int64_t pool_kernel : options.pool_kernels) {
    const std::vector<FitPrompt> prompts = Prepare(records, pool_kernel, options.normalization);
    for (const int64_t dilate : options.dilations) {
      FitSettings settings = fitted.settings;
      settings.dilate = dilate;
      trials.push_back(
          Validate(prompts, settings, pool_kernel, options.num_folds, options.num_heads, step));
      fitted.trials.push_back(TrialJson(trials.back()));
    }
  }
  fitted.trial = BestTrial(trials);
  fitted.settings.dilate = fitted.trial.dilate;
  fitted.settings.max_heads = fitted.trial.chosen_size;
  fitted.prompts = Prepare(records, fitted.trial.pool_kernel, options.normalization);
  const std::vector<Choice> path =
      GreedyPath(fitted.prompts, Everyone(records.size()), fitted.settings);
  if (path.empty()) {
    return absl::InvalidArgumentError(
        "no observation finds any of the needed mass at these budgets; want larger budgets or "
        "other candidates");
  }
  fitted.choice = path.back();
  return fitted;
}

OrderedJson Evaluate(const std::vector<ObservationRecord>& records, const Fitted& fitted) {
  const std::vector<int64_t> all = Everyone(records.size());
  Choice uniform;
  for (size_t c = 0; c < records[0].candidates.size(); ++c) {
    uniform.candidates.push_back(static_cast<int64_t>(c));
    uniform.weights.push_back(1.0);
  }
  OrderedJson by_task = OrderedJson::object();
  OrderedJson by_length = OrderedJson::object();
  OrderedJson worst;
  OrderedJson worst_length;
  for (const auto& [task, lengths] : fitted.trial.recall_by_task) {
    const double recall = MeanOf(lengths);
    by_task[task] = recall;
    if (worst.is_null() || recall < worst["recall"]) worst = {{"task", task}, {"recall", recall}};
    for (const auto& [length, one] : lengths) {
      by_length[task][absl::StrCat(length)] = one;
      if (worst_length.is_null() || one < worst_length["recall"]) {
        worst_length = {{"task", task}, {"length", length}, {"recall", one}};
      }
    }
  }
  return {{"objective", "recall of needed mass, tasks alike, lengths of a task alike"},
          {"number_and_way_chosen_by", fitted.trial.unseen_by_size.empty()
                                           ? "held-out prompts: the records are of one task"
                                           : "held-out tasks"},
          {"held_out_recall", fitted.trial.chosen_recall()},
          {"held_out_recall_by_task", by_task},
          {"held_out_recall_by_task_and_length", by_length},
          {"worst_task", worst["task"]},
          {"worst_task_recall", worst["recall"]},
          {"worst_task_and_length", worst_length},
          {"unseen_task_recall", fitted.trial.unseen_recall_by_task},
          {"fitted_recall", MeanRecall(fitted.prompts, all, fitted.choice, fitted.settings)},
          {"uniform_recall", MeanRecall(fitted.prompts, all, uniform, fitted.settings)},
          {"shuffled_recall",
           ShuffledRecall(fitted.prompts, fitted.choice,
                          static_cast<int64_t>(records[0].candidates.size()), fitted.settings)},
          {"oracle_recall", OracleRecall(fitted.prompts, fitted.settings)}};
}

}  // namespace

absl::StatusOr<CompiledObservationHeads> CompileObservationHeads(
    const std::vector<std::string>& record_paths, const ObservationCompileOptions& options,
    const CompileProgress& progress) {
  KEEPSET_RETURN_IF_ERROR(CheckOptions(options));
  if (record_paths.size() < 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("records: ", record_paths.size(), ", want at least 2 to validate"));
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<ObservationRecord> records, ReadRecords(record_paths));
  KEEPSET_ASSIGN_OR_RETURN(const Fitted fitted, Fit(records, options, progress));

  CompiledObservationHeads compiled;
  ObservationHeadsContent& content = compiled.content;
  content.name = options.name;
  content.version = options.version;
  content.model = records[0].model;
  bool probes = false;
  for (size_t i = 0; i < fitted.choice.candidates.size(); ++i) {
    HeadObservation one = records[0].candidates[fitted.choice.candidates[i]];
    one.weight = static_cast<float>(fitted.choice.weights[i]);
    if (one.weight == 0.0f) continue;
    probes = probes || NeedsProbeRows(one.rows);
    content.observations.push_back(one);
  }
  content.settings.pool_kernel = fitted.trial.pool_kernel;
  content.settings.dilate = fitted.trial.dilate;
  content.settings.normalization = options.normalization;
  if (probes) content.settings.probe = records[0].probe;
  content.budgets = options.budgets;
  content.default_budget = options.default_budget;

  const OrderedJson evaluation = Evaluate(records, fitted);
  std::map<std::string, int64_t> prompts_per_task;
  OrderedJson prompts_per_length = OrderedJson::object();
  std::vector<std::string> digests;
  for (const ObservationRecord& record : records) {
    ++prompts_per_task[record.task];
    OrderedJson& of_length =
        prompts_per_length[record.task][absl::StrCat(LengthClass(record.seq_len))];
    of_length = of_length.is_null() ? 1 : of_length.get<int64_t>() + 1;
    digests.push_back(record.digest);
  }
  std::sort(digests.begin(), digests.end());
  const OrderedJson algorithm = {{"name", "greedy-recall"},
                                 {"max_heads", options.max_heads},
                                 {"folds", options.num_folds},
                                 {"budgets", options.budgets}};
  const OrderedJson provenance = {
      {"source", "offline-calibration"},
      {"number_and_way_chosen_by", evaluation["number_and_way_chosen_by"]},
      {"prompts_per_task", prompts_per_task},
      {"prompts_per_task_and_length", prompts_per_length},
      {"record_digests", digests},
      {"tool_version", options.tool_version},
      {"created", absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", options.created, absl::UTCTimeZone())}};
  content.algorithm_json = algorithm.dump();
  content.provenance_json = provenance.dump();
  content.evaluation_json = evaluation.dump();

  OrderedJson report = evaluation;
  report["records"] = records.size();
  report["candidates"] = records[0].candidates.size();
  report["chosen"] = TrialJson(fitted.trial);
  report["observations"] = OrderedJson::array();
  for (const HeadObservation& one : content.observations) {
    report["observations"].push_back({{"layer", one.layer},
                                      {"head", one.head},
                                      {"rows", ObservedRowsName(one.rows)},
                                      {"weight", one.weight}});
  }
  report["trials"] = fitted.trials;
  compiled.report_json = report.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
  return compiled;
}

}  // namespace keepset::tables
