#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "tables/file_table.h"
#include "tables/strict_json.h"
#include "tables/table_kinds.h"
#include "tables/table_tensors.h"

namespace keepset::tables {
namespace {

using Json = nlohmann::json;

struct ValueRange {
  float low = 0;
  float high = 0;
};
constexpr ValueRange kDefaultHeadRange = {0.8f, 1.5f};
constexpr ValueRange kDefaultGateRange = {0.8f, 1.0f};

struct CompilerKvValues {
  std::vector<float> entropy_edges;  // [E - 1]
  std::vector<float> ppl_edges;      // [P - 1]
  FloatTensor head_weights;          // [N_B or 1, L, H]
  FloatTensor gate_thresholds;       // [N_B or 1, L, E, P]
};

class ParsedCompilerKvTable final : public FileTable<CompilerKvTable> {
 public:
  // `values` may point into `file`.
  ParsedCompilerKvTable(std::shared_ptr<const SafetensorsFile> file, TableHeader header,
                        TableBudgets budgets, CompilerKvValues values)
      : FileTable(std::move(file), std::move(header), std::move(budgets)),
        values_(std::move(values)) {}

  absl::string_view kind() const override { return "compilerkv"; }
  const CompilerKvTable* AsCompilerKv() const override { return this; }

  absl::Span<const float> entropy_edges() const override { return values_.entropy_edges; }
  absl::Span<const float> ppl_edges() const override { return values_.ppl_edges; }
  absl::Span<const float> head_weights() const override { return values_.head_weights.values; }
  absl::Span<const float> gate_thresholds() const override {
    return values_.gate_thresholds.values;
  }

  absl::StatusOr<CompilerKvSlice> Slice(int64_t budget_tokens, TableBudgetMatch budget_match,
                                        int64_t num_layers, LayerMatch layer_match) const override;

 private:
  // Index of `budget_tokens` on the budget axis; appends to `relaxed` when another one serves.
  absl::StatusOr<int64_t> BudgetIndex(int64_t budget_tokens, TableBudgetMatch budget_match,
                                      std::vector<std::string>& relaxed) const;

  const CompilerKvValues values_;
};

absl::StatusOr<int64_t> ParsedCompilerKvTable::BudgetIndex(
    int64_t budget_tokens, TableBudgetMatch budget_match, std::vector<std::string>& relaxed) const {
  if (budget_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(Name(), ": budget_tokens=", budget_tokens, ", want at least 1"));
  }
  const absl::Span<const int64_t> budgets = this->budgets();
  if (budgets.empty()) return 0;
  int64_t nearest = 0;
  for (int64_t i = 0; i < budgets.size(); ++i) {
    if (budgets[i] == budget_tokens) return i;
    const auto rank = [&](int64_t index) {
      return std::pair(std::abs(budgets[index] - budget_tokens), budgets[index]);
    };
    if (rank(i) < rank(nearest)) nearest = i;
  }
  if (budget_match == TableBudgetMatch::kExact) {
    return absl::FailedPreconditionError(
        absl::StrCat(Name(), ": budget_tokens=", budget_tokens, " is not compiled, want one of ",
                     absl::StrJoin(budgets, ", "), " (or ask for table_budget=nearest)"));
  }
  relaxed.push_back(absl::StrCat("table_budget: ", budget_tokens, " served by ", budgets[nearest]));
  return nearest;
}

absl::StatusOr<CompilerKvSlice> ParsedCompilerKvTable::Slice(int64_t budget_tokens,
                                                             TableBudgetMatch budget_match,
                                                             int64_t num_layers,
                                                             LayerMatch layer_match) const {
  CompilerKvSlice slice;
  KEEPSET_ASSIGN_OR_RETURN(const int64_t budget_index,
                           BudgetIndex(budget_tokens, budget_match, slice.relaxed));
  const int64_t table_layers = model().num_layers;
  if (num_layers < 1 || num_layers > kMaxModelLayers) {
    return absl::InvalidArgumentError(
        absl::StrCat(Name(), ": num_layers=", num_layers, ", want 1..", kMaxModelLayers));
  }
  if (num_layers != table_layers && layer_match == LayerMatch::kExact) {
    return absl::FailedPreconditionError(
        absl::StrCat(Name(), ": num_layers=", num_layers, ", want ", table_layers,
                     " (or ask for layer_match=interpolate_depth)"));
  }
  slice.num_layers = num_layers;
  slice.num_qo_heads = model().num_qo_heads;
  slice.num_entropy_bins = values_.entropy_edges.size() + 1;
  slice.num_ppl_bins = values_.ppl_edges.size() + 1;
  const auto resampled = [&](absl::Span<const float> values, int64_t row_size) {
    const int64_t budget_size = table_layers * row_size;
    const auto rows = values.subspan(budget_index * budget_size, budget_size);
    return num_layers == table_layers ? std::vector<float>(rows.begin(), rows.end())
                                      : InterpolateDepth(rows, table_layers, row_size, num_layers);
  };
  slice.head_weights = resampled(values_.head_weights.values, slice.num_qo_heads);
  slice.gate_thresholds =
      resampled(values_.gate_thresholds.values, slice.num_entropy_bins * slice.num_ppl_bins);
  if (num_layers != table_layers) {
    slice.relaxed.push_back(
        absl::StrCat("layer_match: ", num_layers, " layers from ", table_layers));
  }
  return slice;
}

absl::StatusOr<std::vector<float>> ReadEdges(const SafetensorsFile& file, absl::string_view name) {
  KEEPSET_ASSIGN_OR_RETURN(const TensorInfo* tensor,
                           RequireTensor(file, name, TensorDType::kF32, 1));
  KEEPSET_ASSIGN_OR_RETURN(std::vector<float> edges, ReadFloats(file, *tensor));
  for (std::size_t i = 1; i < edges.size(); ++i) {
    if (edges[i] < edges[i - 1]) {
      return FieldError(TensorWhere(file, name), absl::StrCat("element[", i, "]"),
                        absl::StrCat(edges[i]),
                        absl::StrCat("at least ", edges[i - 1], " (edges never decrease)"));
    }
  }
  return edges;
}

// The declared grid, or `fallback`. Head weights must be positive: only the largest weight of a
// group counts (methods.md 1.6 a). Bounds are rounded to F32 like the values they bound.
absl::StatusOr<ValueRange> ReadRange(const Json& document, absl::string_view key, double lowest,
                                     ValueRange fallback, absl::string_view where) {
  const auto grid = document.find("grid");
  if (grid == document.end() || grid->is_null()) return fallback;
  if (!grid->is_object()) return FieldError(where, "grid", PreviewJson(*grid), "an object");
  const auto entry = grid->find(std::string(key));
  if (entry == grid->end() || entry->is_null()) return fallback;
  const bool two =
      entry->is_array() && entry->size() == 2 && (*entry)[0].is_number() && (*entry)[1].is_number();
  if (two) {
    const ValueRange range = {(*entry)[0].get<float>(), (*entry)[1].get<float>()};
    if (std::isfinite(range.high) && range.low >= lowest && range.low <= range.high) return range;
  }
  return FieldError(where, absl::StrCat("grid.", key), PreviewJson(*entry),
                    absl::StrCat("[low, high] with ", lowest, " <= low <= high"));
}

absl::StatusOr<FloatTensor> ViewInRange(const SafetensorsFile& file, const TensorInfo& tensor,
                                        ValueRange range) {
  KEEPSET_ASSIGN_OR_RETURN(FloatTensor view, ViewFloats(file, tensor));
  for (std::size_t i = 0; i < view.values.size(); ++i) {
    if (view.values[i] < range.low || view.values[i] > range.high) {
      return FieldError(TensorWhere(file, tensor.name), absl::StrCat("element[", i, "]"),
                        absl::StrCat(view.values[i]), absl::StrCat(range.low, "..", range.high));
    }
  }
  return view;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const DecisionTable>> ParseCompilerKvTable(
    std::shared_ptr<const SafetensorsFile> shared_file, TableHeader header) {
  constexpr double kLowestHeadWeight = 1e-6;
  const SafetensorsFile& file = *shared_file;
  const std::string& where = file.label();
  CompilerKvValues values;
  KEEPSET_ASSIGN_OR_RETURN(TableBudgets budgets, ReadTableBudgets(file, header.document));
  KEEPSET_ASSIGN_OR_RETURN(values.entropy_edges, ReadEdges(file, "entropy_edges"));
  KEEPSET_ASSIGN_OR_RETURN(values.ppl_edges, ReadEdges(file, "ppl_edges"));

  // Without budgets the tensors have no budget axis.
  std::vector<int64_t> head_shape = {header.model.num_layers, header.model.num_qo_heads};
  std::vector<int64_t> gate_shape = {header.model.num_layers,
                                     static_cast<int64_t>(values.entropy_edges.size()) + 1,
                                     static_cast<int64_t>(values.ppl_edges.size()) + 1};
  const absl::string_view axis = budgets.all.empty() ? "" : "budgets, ";
  const std::string head_axes = absl::StrCat("(", axis, "num_layers, num_qo_heads of model)");
  const std::string gate_axes =
      absl::StrCat("(", axis, "num_layers of model, entropy_edges + 1, ppl_edges + 1)");
  if (!budgets.all.empty()) {
    const auto num_budgets = static_cast<int64_t>(budgets.all.size());
    head_shape.insert(head_shape.begin(), num_budgets);
    gate_shape.insert(gate_shape.begin(), num_budgets);
  }
  KEEPSET_ASSIGN_OR_RETURN(
      const TensorInfo* heads,
      RequireTensor(file, "head_weights", TensorDType::kF32, head_shape.size()));
  KEEPSET_ASSIGN_OR_RETURN(
      const TensorInfo* gates,
      RequireTensor(file, "gate_thresholds", TensorDType::kF32, gate_shape.size()));
  KEEPSET_RETURN_IF_ERROR(RequireShape(file, *heads, head_shape, head_axes));
  KEEPSET_RETURN_IF_ERROR(RequireShape(file, *gates, gate_shape, gate_axes));

  KEEPSET_ASSIGN_OR_RETURN(
      const ValueRange head_range,
      ReadRange(header.document, "head", kLowestHeadWeight, kDefaultHeadRange, where));
  KEEPSET_ASSIGN_OR_RETURN(const ValueRange gate_range,
                           ReadRange(header.document, "gate", 0, kDefaultGateRange, where));
  KEEPSET_ASSIGN_OR_RETURN(values.head_weights, ViewInRange(file, *heads, head_range));
  KEEPSET_ASSIGN_OR_RETURN(values.gate_thresholds, ViewInRange(file, *gates, gate_range));
  header.document = nullptr;
  return std::make_shared<const ParsedCompilerKvTable>(std::move(shared_file), std::move(header),
                                                       std::move(budgets), std::move(values));
}

}  // namespace keepset::tables
