#include "tables/table_compiler.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "tables/record_report.h"

namespace keepset::tables {
namespace {

constexpr int64_t kMaxBins = 1024;
constexpr int64_t kMaxCells = int64_t{1} << 20;
constexpr int64_t kMaxTableValues = int64_t{1} << 26;
constexpr double kMaxConservativeWeight = 1000;
constexpr std::size_t kMaxListedStates = 100;

absl::Status CheckBins(const BinCounts& bins) {
  if (bins.entropy < 1 || bins.entropy > kMaxBins || bins.ppl < 1 || bins.ppl > kMaxBins ||
      bins.entropy * bins.ppl > kMaxCells) {
    return absl::InvalidArgumentError(absl::StrCat(
        "entropy_bins=", bins.entropy, ", ppl_bins=", bins.ppl, ", want 1..", kMaxBins, " each"));
  }
  return absl::OkStatus();
}

absl::Status CheckActions(const ActionGrids& actions) {
  KEEPSET_RETURN_IF_ERROR(CheckActionGrid("head_actions", actions.head));
  return CheckActionGrid("gate_actions", actions.gate);
}

// The range a table of these actions declares: nothing for the paper's own, and room for the value
// of states without records.
std::optional<std::pair<float, float>> DeclaredGrid(const ActionGrid& grid, const ActionGrid& usual,
                                                    float unsupported) {
  if (grid.first == usual.first && grid.step == usual.step && grid.size == usual.size) {
    return std::nullopt;
  }
  return std::pair(std::min(grid.Value(0), unsupported),
                   std::max(grid.Value(grid.size - 1), unsupported));
}

absl::Status CheckOptions(const CompileOptions& options) {
  KEEPSET_RETURN_IF_ERROR(CheckBins(options.bins));
  KEEPSET_RETURN_IF_ERROR(CheckActions(options.actions));
  if (!(options.conservative_weight >= 0 &&
        options.conservative_weight <= kMaxConservativeWeight)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "conservative_weight=", options.conservative_weight, ", want 0..", kMaxConservativeWeight));
  }
  return absl::OkStatus();
}

// States of one kind and what the solvers made of them.
struct FittedKind {
  FittedStates chosen;
  std::optional<FittedStates> exact;  // only in a comparison
  std::optional<FittedStates> adam;
};

FittedKind Fit(const StateStatistics& states, const std::vector<StateRow>& rows,
               const CompileOptions& options) {
  FittedKind fitted;
  const bool compare = options.comparison == SolverComparison::kCompare;
  if (compare || options.solver == TableSolver::kExact) {
    fitted.exact = SolveStates(states, options.conservative_weight, options.num_threads);
  }
  if (compare || options.solver == TableSolver::kAdam) {
    fitted.adam = FitByAdam(rows, states.num_states(), states.num_actions(),
                            options.conservative_weight, options.adam);
  }
  fitted.chosen = options.solver == TableSolver::kExact ? *fitted.exact : *fitted.adam;
  return fitted;
}

// One table array and the states it could not fill.
struct FilledArray {
  std::vector<float> values;
  std::vector<StateKey> unsupported;
};

struct ArrayShape {
  std::vector<int64_t> budgets;
  int64_t num_layers = 0;
  int64_t num_cells = 0;
  int64_t copies = 1;  // neighbouring values that share a state
};

// [budgets, num_layers, num_cells * copies]
FilledArray Fill(const ArrayShape& shape, const StateStatistics& states,
                 const std::vector<int>& actions, const ActionGrid& grid, float unsupported) {
  FilledArray filled;
  for (const int64_t budget : shape.budgets) {
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
      for (int64_t cell = 0; cell < shape.num_cells; ++cell) {
        const StateKey key = {budget, layer, cell};
        const std::optional<int64_t> state = states.Find(key);
        if (!state.has_value()) filled.unsupported.push_back(key);
        const float value = state.has_value() ? grid.Value(actions[*state]) : unsupported;
        filled.values.insert(filled.values.end(), shape.copies, value);
      }
    }
  }
  return filled;
}

template <typename StateReport>
ReportJson ListStates(const std::vector<StateKey>& keys, const StateReport& report) {
  ReportJson list = ReportJson::array();
  for (std::size_t i = 0; i < std::min(keys.size(), kMaxListedStates); ++i) {
    list.push_back(report(keys[i]));
  }
  return list;
}

template <typename StateReport>
ReportJson KindReport(const StateStatistics& states, const FittedStates& chosen,
                      const FilledArray& filled, const ActionGrid& grid,
                      const StateReport& report) {
  ReportJson actions = RecordsPerAction(states, grid);
  std::vector<int64_t> chosen_count(grid.size);
  for (const int action : chosen.actions) ++chosen_count[action];
  for (int action = 0; action < grid.size; ++action) {
    actions[action]["chosen"] = chosen_count[action];
  }
  ReportJson json = {
      {"supported_states", states.num_states()},
      {"unsupported_states", filled.unsupported.size()},
      {"first_unsupported", ListStates(filled.unsupported, report)},
      {"records_per_state", RecordsPerState(states)},
  };
  json.update(ConfidenceReport(states, chosen));
  json["actions"] = std::move(actions);
  return json;
}

template <typename StateReport>
ReportJson DifferenceReport(const StateStatistics& states, const FittedKind& fitted,
                            const ActionGrid& grid, const StateReport& report) {
  std::vector<std::pair<StateKey, int64_t>> different;
  double total = 0;
  int largest = 0;
  for (int64_t state = 0; state < states.num_states(); ++state) {
    const int gap = std::abs(fitted.exact->actions[state] - fitted.adam->actions[state]);
    if (gap == 0) continue;
    total += gap * grid.step;
    largest = std::max(largest, gap);
    different.emplace_back(states.key(state), state);
  }
  std::sort(different.begin(), different.end());
  ReportJson examples = ReportJson::array();
  for (std::size_t i = 0; i < std::min(different.size(), kMaxListedStates); ++i) {
    const auto& [key, state] = different[i];
    ReportJson example = report(key);
    example["records"] = states.total(state);
    example["exact"] = grid.first + grid.step * fitted.exact->actions[state];
    example["adam"] = grid.first + grid.step * fitted.adam->actions[state];
    examples.push_back(std::move(example));
  }
  const double count = std::max<double>(1, states.num_states());
  return {{"states", states.num_states()},
          {"different_states", different.size()},
          {"mean_difference", total / count},
          {"largest_difference", largest * grid.step},
          {"first_differences", std::move(examples)}};
}

ReportJson AdamSettings(const AdamOptions& adam) {
  return {{"learning_rate", adam.learning_rate},
          {"weight_decay", adam.weight_decay},
          {"batch_size", adam.batch_size},
          {"epochs", adam.epochs},
          {"seed", adam.seed},
          {"balance_states", true}};
}

ReportJson AlgorithmJson(const CompileOptions& options, std::optional<HeadUnit> unit) {
  const bool exact = options.solver == TableSolver::kExact;
  ReportJson json = {{"name", "horizon-1-cql"},
                     {"conservative_weight", options.conservative_weight},
                     {"solver", exact ? "exact" : "adam"}};
  if (exact) {
    json["tolerance"] = kCqlTolerance;
  } else {
    json.update(AdamSettings(options.adam));
  }
  json["reward"] = {{"head", "full_loss - compressed_loss"},
                    {"gate",
                     "full_loss - compressed_loss - max(0, candidate_count - budget) / "
                     "sequence_length"}};
  const auto grid_json = [](const ActionGrid& grid) {
    return ReportJson{{"first", grid.first}, {"step", grid.step}, {"count", grid.size}};
  };
  json["head_actions"] = grid_json(options.actions.head);
  json["gate_actions"] = grid_json(options.actions.gate);
  json["head_states"] = unit == HeadUnit::kKvHead ? "kv_head" : "head";
  json["unsupported"] = {{"head", 1.0}, {"gate", 0.8}};
  return json;
}

ReportJson ProvenanceJson(const CompileOptions& options, const RecordStatistics& statistics,
                          const StateStatistics& gates, absl::string_view digest) {
  const bool coupled = statistics.num_unpaired_records() == 0;
  ReportJson policies = ReportJson::object();
  for (const auto& [policy, records] : statistics.policies()) policies[policy] = records;
  const ReportJson head = RecordsPerState(statistics.heads());
  const ReportJson gate = RecordsPerState(gates);
  return {
      {"source", coupled ? "offline-calibration" : "offline-independent-ablation"},
      {"calibration_digest", std::string(digest)},
      {"records_per_state", {{"head", head["min"]}, {"gate", gate["min"]}}},
      {"median_records_per_state", {{"head", head["median"]}, {"gate", gate["median"]}}},
      {"num_records", statistics.num_head_records() + statistics.num_gate_records()},
      {"num_head_records", statistics.num_head_records()},
      {"num_gate_records", statistics.num_gate_records()},
      {"num_rejected_records", statistics.num_rejected()},
      {"head_supported_states", statistics.heads().num_states()},
      {"gate_supported_states", gates.num_states()},
      {"coupled_reward_evaluation", coupled},
      {"paired_policy_counts", std::move(policies)},
      {"tool_version", options.tool_version},
      {"created", absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", options.created, absl::UTCTimeZone())}};
}

std::string Dump(const ReportJson& json) {
  return json.dump(-1, ' ', false, ReportJson::error_handler_t::replace);
}

absl::StatusOr<std::vector<int64_t>> CompiledBudgets(const RecordStatistics& statistics,
                                                     const CompileOptions& options) {
  KEEPSET_RETURN_IF_ERROR(statistics.CheckCoverage());
  std::vector<int64_t> budgets;
  for (const auto& [budget, records] : statistics.head_budgets()) budgets.push_back(budget);
  const auto num_budgets = static_cast<int64_t>(budgets.size());
  const int64_t per_layer =
      std::max(options.model.num_qo_heads, options.bins.entropy * options.bins.ppl);
  if (num_budgets > kMaxTableValues / (options.model.num_layers * per_layer)) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "a table of ", num_budgets, " budgets, ", options.model.num_layers, " layers and ",
        per_layer, " values each, want at most ", kMaxTableValues, " values"));
  }
  if (options.default_budget.has_value() &&
      !std::binary_search(budgets.begin(), budgets.end(), *options.default_budget)) {
    return absl::InvalidArgumentError(absl::StrCat("default_budget=", *options.default_budget,
                                                   ", want one of ", absl::StrJoin(budgets, ", ")));
  }
  return budgets;
}

}  // namespace

absl::StatusOr<CompiledTable> CompileTable(const std::vector<std::string>& record_paths,
                                           const CompileOptions& options,
                                           const RecordProgress& progress) {
  KEEPSET_RETURN_IF_ERROR(CheckOptions(options));
  const ModelFingerprint& model = options.model;
  const bool needs_rows =
      options.solver == TableSolver::kAdam || options.comparison == SolverComparison::kCompare;
  const RowKeeping keeping = needs_rows ? RowKeeping::kKeep : RowKeeping::kNone;
  RecordStatistics statistics(options.limits, keeping, options.actions);
  RecordReadOptions read;
  read.rules = {options.paired_policy, model.num_layers, model.num_qo_heads, model.num_kv_heads,
                options.actions};
  read.num_threads = options.num_threads;
  KEEPSET_ASSIGN_OR_RETURN(
      const std::string digest,
      ReadCalibrationRecords(
          record_paths, read, [&](const RecordChunk& chunk) { return statistics.Add(chunk); },
          progress));
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<int64_t> budgets,
                           CompiledBudgets(statistics, options));
  KEEPSET_ASSIGN_OR_RETURN(const GateStatistics gates,
                           statistics.BinGates(options.bins.entropy, options.bins.ppl, keeping));

  const FittedKind head_fit = Fit(statistics.heads(), statistics.head_rows(), options);
  const FittedKind gate_fit = Fit(gates.states, gates.rows, options);
  const HeadUnit unit = statistics.head_unit().value_or(HeadUnit::kQueryHead);
  const bool grouped = unit == HeadUnit::kKvHead;
  const int64_t num_units = grouped ? model.num_kv_heads : model.num_qo_heads;
  FilledArray heads = Fill({budgets, model.num_layers, num_units, model.num_qo_heads / num_units},
                           statistics.heads(), head_fit.chosen.actions, options.actions.head,
                           kUnsupportedHeadWeight);
  FilledArray cells =
      Fill({budgets, model.num_layers, options.bins.entropy * options.bins.ppl, 1}, gates.states,
           gate_fit.chosen.actions, options.actions.gate, kUnsupportedGate);

  const auto head_state = [unit](const StateKey& key) { return HeadStateReport(key, unit); };
  const auto gate_state = [&options](const StateKey& key) {
    return GateStateReport(key, options.bins.ppl);
  };
  ReportJson report = {
      {"format", "keepset.compile_report"},
      {"name", options.name},
      {"version", options.version},
      {"calibration_digest", digest},
      {"records", CountsReport(statistics)},
      {"budgets", budgets},
      {"algorithm", AlgorithmJson(options, unit)},
      {"head",
       KindReport(statistics.heads(), head_fit.chosen, heads, options.actions.head, head_state)},
      {"gate", KindReport(gates.states, gate_fit.chosen, cells, options.actions.gate, gate_state)},
      {"coverage", CoverageReport(gates)}};
  if (options.solver == TableSolver::kExact) {
    report["fit"] = {{"tolerance", kCqlTolerance},
                     {"largest_residual",
                      std::max(head_fit.chosen.largest_residual, gate_fit.chosen.largest_residual)},
                     {"most_iterations",
                      std::max(head_fit.chosen.most_iterations, gate_fit.chosen.most_iterations)}};
  }
  if (options.comparison == SolverComparison::kCompare) {
    report["comparison"] = {
        {"adam", AdamSettings(options.adam)},
        {"head", DifferenceReport(statistics.heads(), head_fit, options.actions.head, head_state)},
        {"gate", DifferenceReport(gates.states, gate_fit, options.actions.gate, gate_state)}};
  }

  CompiledTable table;
  table.report_json = Dump(report);
  CompilerKvTableContent& content = table.content;
  content.name = options.name;
  content.version = options.version;
  content.model = model;
  content.budgets = budgets;
  content.default_budget = options.default_budget;
  content.entropy_edges = gates.entropy_edges;
  content.ppl_edges = gates.ppl_edges;
  content.head_weights = std::move(heads.values);
  content.gate_thresholds = std::move(cells.values);
  content.head_grid = DeclaredGrid(options.actions.head, kHeadActions, kUnsupportedHeadWeight);
  content.gate_grid = DeclaredGrid(options.actions.gate, kGateActions, kUnsupportedGate);
  content.algorithm_json = Dump(AlgorithmJson(options, unit));
  content.provenance_json = Dump(ProvenanceJson(options, statistics, gates.states, digest));
  return table;
}

absl::StatusOr<std::string> SummarizeRecords(const std::vector<std::string>& record_paths,
                                             const BinCounts& bins, const ActionGrids& actions,
                                             int num_threads, const RecordProgress& progress) {
  KEEPSET_RETURN_IF_ERROR(CheckBins(bins));
  KEEPSET_RETURN_IF_ERROR(CheckActions(actions));
  RecordLimits limits;
  limits.max_rejected = INT64_MAX;
  RecordStatistics statistics(limits, RowKeeping::kNone, actions);
  RecordReadOptions read;
  read.rules.paired_policy = PairedPolicyRule::kOptional;
  read.rules.actions = actions;
  read.num_threads = num_threads;
  KEEPSET_ASSIGN_OR_RETURN(
      const std::string digest,
      ReadCalibrationRecords(
          record_paths, read, [&](const RecordChunk& chunk) { return statistics.Add(chunk); },
          progress));
  const auto states_json = [](const StateStatistics& states, const auto& report) {
    std::vector<std::pair<StateKey, int64_t>> order;
    for (int64_t state = 0; state < states.num_states(); ++state) {
      order.emplace_back(states.key(state), state);
    }
    std::sort(order.begin(), order.end());
    ReportJson list = ReportJson::array();
    for (const auto& [key, state] : order) {
      ReportJson entry = report(key);
      entry["records"] = states.total(state);
      list.push_back(std::move(entry));
    }
    return list;
  };
  ReportJson summary = {{"format", "keepset.records_summary"},
                        {"digest", digest},
                        {"records", CountsReport(statistics)},
                        {"same_budgets", statistics.CheckCoverage().ok()}};
  const HeadUnit unit = statistics.head_unit().value_or(HeadUnit::kQueryHead);
  summary["head"] = {{"states", statistics.heads().num_states()},
                     {"records_per_state", RecordsPerState(statistics.heads())},
                     {"actions", RecordsPerAction(statistics.heads(), actions.head)},
                     {"per_state", states_json(statistics.heads(), [unit](const StateKey& key) {
                        return HeadStateReport(key, unit);
                      })}};
  if (statistics.num_gate_records() > 0) {
    KEEPSET_ASSIGN_OR_RETURN(const GateStatistics gates,
                             statistics.BinGates(bins.entropy, bins.ppl, RowKeeping::kNone));
    summary["gate"] = {{"states", gates.states.num_states()},
                       {"records_per_state", RecordsPerState(gates.states)},
                       {"actions", RecordsPerAction(gates.states, actions.gate)},
                       {"per_state", states_json(gates.states, [&bins](const StateKey& key) {
                          return GateStateReport(key, bins.ppl);
                        })}};
    summary["coverage"] = CoverageReport(gates);
  }
  return Dump(summary);
}

}  // namespace keepset::tables
