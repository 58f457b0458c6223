#include <algorithm>
#include <cmath>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tables/rank_correlation.h"
#include "tables/strict_json.h"
#include "tables/table_file.h"

namespace keepset::tables {
namespace {

using OrderedJson = nlohmann::ordered_json;

// The largest changes listed per tensor; the counts cover all.
constexpr std::size_t kListedCells = 50;

// Rows of one budget in both tables; nullopt: tables for any budget.
struct SharedBudget {
  std::optional<int64_t> budget;
  std::size_t row_a = 0;
  std::size_t row_b = 0;
};

struct ChangedCell {
  const SharedBudget* budget = nullptr;
  std::size_t offset = 0;  // within the rows of the budget
  float a = 0;
  float b = 0;
  double size() const { return std::abs(static_cast<double>(b) - static_cast<double>(a)); }
};

OrderedJson OptionalNumber(const auto& value) {
  return value.has_value() ? OrderedJson(*value) : OrderedJson(nullptr);
}

// Decimal as a person wrote it: 0.8, not 0.800000011920929.
double Shortest(float value) {
  return OrderedJson::parse(absl::StrCat(value), nullptr, false).get<double>();
}

std::vector<SharedBudget> SharedBudgets(const CompilerKvTable& a, const CompilerKvTable& b) {
  if (a.budgets().empty() && b.budgets().empty()) return {SharedBudget{}};
  std::vector<SharedBudget> shared;
  for (std::size_t i = 0; i < a.budgets().size(); ++i) {
    for (std::size_t j = 0; j < b.budgets().size(); ++j) {
      if (a.budgets()[i] == b.budgets()[j]) shared.push_back({a.budgets()[i], i, j});
    }
  }
  return shared;
}

// Mean of the known correlations; null when no layer ranks its heads on both sides.
OrderedJson Mean(const std::vector<double>& values) {
  if (values.empty()) return nullptr;
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

OrderedJson HeadRankings(const CompilerKvTable& a, const CompilerKvTable& b,
                         const std::vector<SharedBudget>& shared) {
  const auto layers = static_cast<std::size_t>(a.model().num_layers);
  const auto heads = static_cast<std::size_t>(a.model().num_qo_heads);
  OrderedJson by_layer = OrderedJson::array();
  std::vector<double> spearmans;
  std::vector<double> kendalls;
  for (const SharedBudget& budget : shared) {
    for (std::size_t layer = 0; layer < layers; ++layer) {
      const auto of_a = a.head_weights().subspan((budget.row_a * layers + layer) * heads, heads);
      const auto of_b = b.head_weights().subspan((budget.row_b * layers + layer) * heads, heads);
      const std::optional<double> spearman = SpearmanCorrelation(of_a, of_b);
      const std::optional<double> kendall = KendallTau(of_a, of_b);
      if (spearman.has_value()) spearmans.push_back(*spearman);
      if (kendall.has_value()) kendalls.push_back(*kendall);
      by_layer.push_back({{"budget", OptionalNumber(budget.budget)},
                          {"layer", layer},
                          {"spearman", OptionalNumber(spearman)},
                          {"kendall", OptionalNumber(kendall)}});
    }
  }
  return {{"mean_spearman", Mean(spearmans)},
          {"mean_kendall", Mean(kendalls)},
          {"by_layer", std::move(by_layer)}};
}

// `row_size`: elements of one budget. `place` adds where a cell lies to its entry.
template <typename Place>
OrderedJson ChangedCells(absl::Span<const float> a, absl::Span<const float> b, std::size_t row_size,
                         const std::vector<SharedBudget>& shared, const Place& place) {
  std::vector<ChangedCell> changed;
  double sum = 0;
  double largest = 0;
  for (const SharedBudget& budget : shared) {
    for (std::size_t i = 0; i < row_size; ++i) {
      const ChangedCell cell = {&budget, i, a[budget.row_a * row_size + i],
                                b[budget.row_b * row_size + i]};
      if (cell.a == cell.b) continue;
      sum += cell.size();
      largest = std::max(largest, cell.size());
      changed.push_back(cell);
    }
  }
  const std::size_t listed = std::min(changed.size(), kListedCells);
  // Ties in file order, so that the list is the same on every run.
  std::stable_sort(changed.begin(), changed.end(),
                   [](const auto& x, const auto& y) { return x.size() > y.size(); });
  OrderedJson cells = OrderedJson::array();
  for (std::size_t i = 0; i < listed; ++i) {
    OrderedJson entry = {{"budget", OptionalNumber(changed[i].budget->budget)}};
    place(changed[i].offset, entry);
    entry["a"] = Shortest(changed[i].a);
    entry["b"] = Shortest(changed[i].b);
    cells.push_back(std::move(entry));
  }
  return {{"compared", shared.size() * row_size},
          {"changed", changed.size()},
          {"largest", largest},
          {"mean", changed.empty() ? 0 : sum / static_cast<double>(changed.size())},
          {"cells", std::move(cells)}};
}

void CompareCompilerKv(const CompilerKvTable& a, const CompilerKvTable& b, OrderedJson& document) {
  const auto layers = static_cast<std::size_t>(a.model().num_layers);
  const auto heads = static_cast<std::size_t>(a.model().num_qo_heads);
  const std::vector<SharedBudget> shared = SharedBudgets(a, b);
  OrderedJson budgets = OrderedJson::array();
  for (const SharedBudget& budget : shared) {
    if (budget.budget.has_value()) budgets.push_back(*budget.budget);
  }
  document["shared_budgets"] = std::move(budgets);
  if (shared.empty() || a.model().num_layers != b.model().num_layers ||
      a.model().num_qo_heads != b.model().num_qo_heads) {
    return;
  }
  document["head_rankings"] = HeadRankings(a, b, shared);
  document["head_weights"] = ChangedCells(a.head_weights(), b.head_weights(), layers * heads,
                                          shared, [&](std::size_t offset, OrderedJson& entry) {
                                            entry["layer"] = offset / heads;
                                            entry["head"] = offset % heads;
                                          });
  // Cells of other bins stand for other prompts.
  if (a.entropy_edges() != b.entropy_edges() || a.ppl_edges() != b.ppl_edges()) return;
  const std::size_t ppl_bins = a.ppl_edges().size() + 1;
  const std::size_t bins = (a.entropy_edges().size() + 1) * ppl_bins;
  document["gate_thresholds"] =
      ChangedCells(a.gate_thresholds(), b.gate_thresholds(), layers * bins, shared,
                   [&](std::size_t offset, OrderedJson& entry) {
                     entry["layer"] = offset / bins;
                     entry["entropy_bin"] = offset % bins / ppl_bins;
                     entry["ppl_bin"] = offset % ppl_bins;
                   });
}

}  // namespace

std::string CompareTables(const DecisionTable& a, const DecisionTable& b) {
  OrderedJson document = {{"shared_budgets", nullptr},
                          {"head_rankings", nullptr},
                          {"head_weights", nullptr},
                          {"gate_thresholds", nullptr}};
  if (a.AsCompilerKv() != nullptr && b.AsCompilerKv() != nullptr) {
    CompareCompilerKv(*a.AsCompilerKv(), *b.AsCompilerKv(), document);
  }
  return document.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

}  // namespace keepset::tables
