#include <algorithm>

#include "tables/observation_heads_table.h"
#include "tables/strict_json.h"
#include "tables/table_file.h"

namespace keepset::tables {
namespace {

using OrderedJson = nlohmann::ordered_json;

OrderedJson TensorSummary(std::vector<int64_t> shape, absl::Span<const float> values) {
  OrderedJson summary = {{"shape", std::move(shape)}, {"min", nullptr}, {"max", nullptr}};
  if (!values.empty()) {
    const auto [low, high] = std::minmax_element(values.begin(), values.end());
    summary["min"] = *low;
    summary["max"] = *high;
  }
  return summary;
}

OrderedJson List(absl::Span<const float> values) {
  return std::vector<float>(values.begin(), values.end());
}

void DescribeCompilerKv(const CompilerKvTable& table, OrderedJson& document) {
  const auto entropy_bins = static_cast<int64_t>(table.entropy_edges().size()) + 1;
  const auto ppl_bins = static_cast<int64_t>(table.ppl_edges().size()) + 1;
  std::vector<int64_t> head_shape = {table.model().num_layers, table.model().num_qo_heads};
  std::vector<int64_t> gate_shape = {table.model().num_layers, entropy_bins, ppl_bins};
  document["budgets"] = nullptr;
  if (!table.budgets().empty()) {
    const auto num_budgets = static_cast<int64_t>(table.budgets().size());
    head_shape.insert(head_shape.begin(), num_budgets);
    gate_shape.insert(gate_shape.begin(), num_budgets);
    document["budgets"] = std::vector<int64_t>(table.budgets().begin(), table.budgets().end());
  }
  document["default_budget"] = nullptr;
  if (table.default_budget().has_value()) document["default_budget"] = *table.default_budget();
  document["entropy_bins"] = entropy_bins;
  document["ppl_bins"] = ppl_bins;
  document["entropy_edges"] = List(table.entropy_edges());
  document["ppl_edges"] = List(table.ppl_edges());
  document["tensors"] = {{"head_weights", TensorSummary(head_shape, table.head_weights())},
                         {"gate_thresholds", TensorSummary(gate_shape, table.gate_thresholds())}};
}

void DescribeObservationHeads(const ObservationHeadsTable& table, OrderedJson& document) {
  document["budgets"] = std::vector<int64_t>(table.budgets().begin(), table.budgets().end());
  document["default_budget"] = nullptr;
  if (table.default_budget().has_value()) document["default_budget"] = *table.default_budget();
  const OrderedJson stated = OrderedJson::parse(table.metadata_json(), nullptr, false);
  document["observation_heads"] = stated["observation_heads"];
  document["observations"] = OrderedJson::array();
  for (const HeadObservation& one : table.observations()) {
    document["observations"].push_back({{"layer", one.layer},
                                        {"head", one.head},
                                        {"rows", ObservedRowsName(one.rows)},
                                        {"weight", one.weight}});
  }
}

}  // namespace

std::string InspectTable(const DecisionTable& table) {
  const OrderedJson stated = OrderedJson::parse(table.metadata_json(), nullptr, false);
  OrderedJson document = {{"kind", table.kind()},
                          {"name", table.identity().name},
                          {"version", table.identity().version},
                          {"digest", table.identity().digest},
                          {"model", OrderedJson::parse(ModelFingerprintJson(table.model()))}};
  for (const char* key : {"algorithm", "provenance", "evaluation"}) {
    const auto value = stated.find(key);
    document[key] = value == stated.end() ? OrderedJson(nullptr) : *value;
  }
  if (const CompilerKvTable* compilerkv = table.AsCompilerKv()) {
    DescribeCompilerKv(*compilerkv, document);
  }
  if (const ObservationHeadsTable* heads = table.AsObservationHeads()) {
    DescribeObservationHeads(*heads, document);
  }
  document["ignored"] = table.ignored();
  return document.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

}  // namespace keepset::tables
