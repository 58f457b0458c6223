#include "tables/record_report.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"

namespace keepset::tables {
namespace {

constexpr double kStandardErrors = 2;

ReportJson BudgetCounts(const std::map<int64_t, int64_t>& budgets) {
  ReportJson counts = ReportJson::object();
  for (const auto& [budget, records] : budgets) counts[absl::StrCat(budget)] = records;
  return counts;
}

// The shortest decimal that reads back as the same float, so 0.8f is written 0.8.
ReportJson ShortestFloat(float value) {
  return ReportJson::parse(absl::StrCat(value), nullptr, false);
}

ReportJson Edges(const std::vector<float>& edges) {
  ReportJson list = ReportJson::array();
  for (const float edge : edges) list.push_back(static_cast<double>(edge));
  return list;
}

}  // namespace

ReportJson CountsReport(const RecordStatistics& statistics) {
  ReportJson policies = ReportJson::object();
  for (const auto& [policy, records] : statistics.policies()) policies[policy] = records;
  return {{"accepted", statistics.num_head_records() + statistics.num_gate_records()},
          {"head", statistics.num_head_records()},
          {"gate", statistics.num_gate_records()},
          {"unpaired", statistics.num_unpaired_records()},
          {"rejected", statistics.num_rejected()},
          {"duplicates", statistics.num_duplicates()},
          {"first_rejections", statistics.first_rejections()},
          {"head_per_budget", BudgetCounts(statistics.head_budgets())},
          {"gate_per_budget", BudgetCounts(statistics.gate_budgets())},
          {"paired_policies", std::move(policies)}};
}

ReportJson RecordsPerState(const StateStatistics& states) {
  std::vector<int64_t> totals(states.num_states());
  for (int64_t state = 0; state < states.num_states(); ++state) {
    totals[state] = states.total(state);
  }
  if (totals.empty()) return {{"min", 0}, {"median", 0}, {"max", 0}};
  std::sort(totals.begin(), totals.end());
  return {{"min", totals.front()}, {"median", totals[totals.size() / 2]}, {"max", totals.back()}};
}

ReportJson RecordsPerAction(const StateStatistics& states, const ActionGrid& grid) {
  std::vector<int64_t> records(grid.size);
  for (int64_t state = 0; state < states.num_states(); ++state) {
    for (int action = 0; action < grid.size; ++action) {
      records[action] += states.counts(state)[action];
    }
  }
  ReportJson list = ReportJson::array();
  for (int action = 0; action < grid.size; ++action) {
    list.push_back({{"action", ShortestFloat(grid.Value(action))}, {"records", records[action]}});
  }
  return list;
}

ReportJson CoverageReport(const GateStatistics& gates) {
  const auto num_entropy_bins = static_cast<int64_t>(gates.entropy_edges.size()) + 1;
  const auto num_ppl_bins = static_cast<int64_t>(gates.ppl_edges.size()) + 1;
  std::vector<std::vector<int64_t>> cells(num_entropy_bins, std::vector<int64_t>(num_ppl_bins));
  for (int64_t state = 0; state < gates.states.num_states(); ++state) {
    const int64_t cell = gates.states.key(state).cell;
    cells[cell / num_ppl_bins][cell % num_ppl_bins] += gates.states.total(state);
  }
  int64_t covered = 0;
  for (const std::vector<int64_t>& row : cells) {
    covered += std::count_if(row.begin(), row.end(), [](int64_t count) { return count > 0; });
  }
  return {{"cells", num_entropy_bins * num_ppl_bins},
          {"covered_cells", covered},
          {"entropy_edges", Edges(gates.entropy_edges)},
          {"ppl_edges", Edges(gates.ppl_edges)},
          {"records_per_cell", cells}};
}

ReportJson HeadStateReport(const StateKey& key, HeadUnit unit) {
  return {{"budget", key.budget},
          {"layer", key.layer},
          {unit == HeadUnit::kKvHead ? "kv_head" : "head", key.cell}};
}

ReportJson GateStateReport(const StateKey& key, int64_t num_ppl_bins) {
  return {{"budget", key.budget},
          {"layer", key.layer},
          {"entropy_bin", key.cell / num_ppl_bins},
          {"ppl_bin", key.cell % num_ppl_bins}};
}

ReportJson ConfidenceReport(const StateStatistics& states, const FittedStates& fitted) {
  int64_t single_action = 0;
  int64_t close = 0;
  for (int64_t state = 0; state < states.num_states(); ++state) {
    const absl::Span<const int64_t> counts = states.counts(state);
    const double* q = fitted.q.data() + state * states.num_actions();
    const int best = fitted.actions[state];
    int second = -1;
    for (int action = 0; action < states.num_actions(); ++action) {
      if (action == best || counts[action] == 0) continue;
      if (second < 0 || q[action] > q[second]) second = action;
    }
    if (second < 0) {
      ++single_action;
      continue;
    }
    const double samples = 1.0 / static_cast<double>(std::max<int64_t>(counts[best], 1)) +
                           1.0 / static_cast<double>(counts[second]);
    const double error = std::sqrt(states.RewardVariance(state) * samples);
    if (q[best] - q[second] <= kStandardErrors * error) ++close;
  }
  return {{"single_action_states", single_action}, {"close_states", close}};
}

}  // namespace keepset::tables
