#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "tables/observation_heads_table.h"
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

Json SettingsJson(const ObservationSettings& settings) {
  Json json = {
      {"pool_kernel", settings.pool_kernel},
      {"dilate", settings.dilate},
      {"merge", settings.merge == ObservationMerge::kMax ? "max" : "sum"},
      {"normalization", settings.normalization == ObservationNormalization::kSum ? "sum" : "max"}};
  for (const LayerGroup& group : settings.layer_groups) {
    json["layer_groups"].push_back({group.begin, group.end});
  }
  if (settings.probe.has_value()) {
    json["probe"] = {{"name", settings.probe->name}, {"text", settings.probe->text}};
  }
  for (const RiskPoint& point : settings.risk_curve) {
    json["risk"]["curve"].push_back({point.outside_mass, point.miss_rate});
  }
  return json;
}

absl::StatusOr<Json> DocumentOf(const ObservationHeadsContent& content) {
  const std::string where = absl::StrCat("table ", content.name);
  Json document = {
      {"format", "keepset.table"},   {"format_version", 1},
      {"kind", "observation_heads"}, {"name", content.name},
      {"version", content.version},  {"observation_heads", SettingsJson(content.settings)}};
  const std::pair<const char*, const std::string*> objects[] = {
      {"algorithm", &content.algorithm_json},
      {"provenance", &content.provenance_json},
      {"evaluation", &content.evaluation_json}};
  for (const auto& [key, text] : objects) {
    KEEPSET_ASSIGN_OR_RETURN(document[key],
                             ParseStrictJsonObject(*text, absl::StrCat(where, ": ", key)));
  }
  KEEPSET_ASSIGN_OR_RETURN(
      document["model"],
      ParseStrictJsonObject(ModelFingerprintJson(content.model), absl::StrCat(where, ": model")));
  if (content.default_budget.has_value()) document["default_budget"] = *content.default_budget;
  return document;
}

}  // namespace

absl::StatusOr<std::string> SerializeTable(const ObservationHeadsContent& content) {
  KEEPSET_ASSIGN_OR_RETURN(const Json document, DocumentOf(content));
  std::vector<int32_t> heads;
  std::vector<int32_t> rows;
  std::vector<float> weights;
  for (const HeadObservation& one : content.observations) {
    heads.push_back(static_cast<int32_t>(one.layer));
    heads.push_back(static_cast<int32_t>(one.head));
    rows.push_back(static_cast<int32_t>(one.rows));
    weights.push_back(one.weight);
  }
  const auto count = static_cast<int64_t>(content.observations.size());
  std::vector<TensorToWrite> tensors;
  if (!content.budgets.empty()) {
    // First, because its 8-byte elements keep the later tensors aligned too.
    tensors.push_back({"budgets",
                       TensorDType::kI64,
                       {static_cast<int64_t>(content.budgets.size())},
                       BytesOf(content.budgets)});
  }
  tensors.push_back({"heads", TensorDType::kI32, {count, 2}, BytesOf(heads)});
  tensors.push_back({"weights", TensorDType::kF32, {count}, BytesOf(weights)});
  tensors.push_back({"rows", TensorDType::kI32, {count}, BytesOf(rows)});
  KEEPSET_ASSIGN_OR_RETURN(
      std::string bytes,
      SerializeSafetensors(
          {{"keepset", document.dump(-1, ' ', false, Json::error_handler_t::replace)}}, tensors));
  const absl::Span<const std::byte> view(reinterpret_cast<const std::byte*>(bytes.data()),
                                         bytes.size());
  KEEPSET_RETURN_IF_ERROR(ParseTable(view, absl::StrCat("table ", content.name)).status());
  return bytes;
}

}  // namespace keepset::tables
