#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "tables/safetensors.h"
#include "tables/strict_json.h"
#include "tables/table_file.h"

namespace keepset::tables {
namespace {

using Json = nlohmann::json;

template <typename T>
absl::Span<const std::byte> BytesOf(const std::vector<T>& values) {
  return {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)};
}

// The shortest decimal that reads back as the same float, so 0.8f is written 0.8.
Json ShortestJson(float value) { return Json::parse(absl::StrCat(value), nullptr, false); }

absl::StatusOr<Json> DocumentOf(const CompilerKvTableContent& content) {
  const std::string where = absl::StrCat("table ", content.name);
  Json document = {{"format", "keepset.table"},
                   {"format_version", 1},
                   {"kind", "compilerkv"},
                   {"name", content.name},
                   {"version", content.version}};
  KEEPSET_ASSIGN_OR_RETURN(
      document["model"],
      ParseStrictJsonObject(ModelFingerprintJson(content.model), absl::StrCat(where, ": model")));
  KEEPSET_ASSIGN_OR_RETURN(
      document["algorithm"],
      ParseStrictJsonObject(content.algorithm_json, absl::StrCat(where, ": algorithm")));
  KEEPSET_ASSIGN_OR_RETURN(
      document["provenance"],
      ParseStrictJsonObject(content.provenance_json, absl::StrCat(where, ": provenance")));
  KEEPSET_ASSIGN_OR_RETURN(
      document["evaluation"],
      ParseStrictJsonObject(content.evaluation_json, absl::StrCat(where, ": evaluation")));
  if (content.default_budget.has_value()) document["default_budget"] = *content.default_budget;
  for (const auto& [key, grid] :
       {std::pair("head", content.head_grid), std::pair("gate", content.gate_grid)}) {
    if (!grid.has_value()) continue;
    document["grid"][key] = {ShortestJson(grid->first), ShortestJson(grid->second)};
  }
  return document;
}

}  // namespace

absl::StatusOr<std::string> SerializeTable(const CompilerKvTableContent& content) {
  KEEPSET_ASSIGN_OR_RETURN(const Json document, DocumentOf(content));
  const auto num_entropy_bins = static_cast<int64_t>(content.entropy_edges.size()) + 1;
  const auto num_ppl_bins = static_cast<int64_t>(content.ppl_edges.size()) + 1;
  std::vector<int64_t> head_shape = {content.model.num_layers, content.model.num_qo_heads};
  std::vector<int64_t> gate_shape = {content.model.num_layers, num_entropy_bins, num_ppl_bins};
  std::vector<TensorToWrite> tensors;
  if (!content.budgets.empty()) {
    const auto num_budgets = static_cast<int64_t>(content.budgets.size());
    head_shape.insert(head_shape.begin(), num_budgets);
    gate_shape.insert(gate_shape.begin(), num_budgets);
    // First, because its 8-byte elements keep the later tensors aligned too.
    tensors.push_back({"budgets", TensorDType::kI64, {num_budgets}, BytesOf(content.budgets)});
  }
  tensors.push_back(
      {"entropy_edges", TensorDType::kF32, {num_entropy_bins - 1}, BytesOf(content.entropy_edges)});
  tensors.push_back(
      {"ppl_edges", TensorDType::kF32, {num_ppl_bins - 1}, BytesOf(content.ppl_edges)});
  tensors.push_back({"head_weights", TensorDType::kF32, head_shape, BytesOf(content.head_weights)});
  tensors.push_back(
      {"gate_thresholds", TensorDType::kF32, gate_shape, BytesOf(content.gate_thresholds)});
  KEEPSET_ASSIGN_OR_RETURN(
      std::string bytes,
      SerializeSafetensors(
          {{"keepset", document.dump(-1, ' ', false, Json::error_handler_t::replace)}}, tensors));
  const absl::Span<const std::byte> view(reinterpret_cast<const std::byte*>(bytes.data()),
                                         bytes.size());
  KEEPSET_RETURN_IF_ERROR(ParseTable(view, absl::StrCat("table ", content.name)).status());
  return bytes;
}

CompilerKvTableContent UniformTable(const ModelFingerprint& model, float head_weight, float gate) {
  CompilerKvTableContent content;
  content.name = "uniform";
  content.version = "1";
  content.model = model;
  content.head_weights.assign(model.num_layers * model.num_qo_heads, head_weight);
  content.gate_thresholds.assign(model.num_layers, gate);
  content.algorithm_json = R"({"name": "uniform"})";
  content.provenance_json = R"({"source": "uniform"})";
  return content;
}

}  // namespace keepset::tables
