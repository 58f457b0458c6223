#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "tables/file_bytes.h"
#include "tables/npy_reader.h"
#include "tables/strict_json.h"
#include "tables/table_file.h"

namespace keepset::tables {
namespace {

using Json = nlohmann::json;

constexpr int64_t kReferenceVersion = 2;
constexpr absl::string_view kSources[] = {"offline-calibration", "offline-independent-ablation"};
// Copied as they are into the provenance of the imported table.
constexpr absl::string_view kProvenanceKeys[] = {
    "num_records",           "num_head_records",         "num_gate_records",
    "head_supported_states", "gate_supported_states",    "coupled_reward_evaluation",
    "paired_policy_counts",  "allow_head_interpolation", "allow_nearest_budget"};
constexpr absl::string_view kAlgorithmKeys[] = {"reward", "head_actions", "gate_actions"};

absl::StatusOr<Json> ReadManifest(const std::string& path) {
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<FileBytes> file,
                           FileBytes::Open(path, ReadMode::kCopy));
  const absl::Span<const std::byte> bytes = file->bytes();
  return ParseStrictJsonObject(
      absl::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()), path);
}

absl::Status CheckSource(const Json& manifest, const std::string& where) {
  KEEPSET_ASSIGN_OR_RETURN(const std::string source, StringField(manifest, "source", where));
  if (std::find(std::begin(kSources), std::end(kSources), source) != std::end(kSources)) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrCat(where, ": source=", PreviewJson(source),
                                                    ", want one of ", absl::StrJoin(kSources, ", "),
                                                    "; simulated or synthetic tables are refused"));
}

absl::Status CheckCount(const Json& manifest, absl::string_view key, absl::string_view model_field,
                        int64_t want, const std::string& where) {
  KEEPSET_ASSIGN_OR_RETURN(const int64_t count, IntField(manifest, key, 1, INT32_MAX, where));
  if (count == want) return absl::OkStatus();
  return FieldError(where, key, absl::StrCat(count),
                    absl::StrCat(want, ", the ", model_field, " of the stated model"));
}

// The array the manifest names under `key`. Its name must not lead out of the directory.
absl::StatusOr<NpyArray> ReadArray(const Json& manifest, const std::string& directory,
                                   absl::string_view key, absl::string_view fallback,
                                   const std::string& where) {
  KEEPSET_ASSIGN_OR_RETURN(const std::optional<std::string> stated,
                           OptionalStringField(manifest, key, where));
  const std::string name = stated.value_or(std::string(fallback));
  if (name.empty() || name == "." || name == ".." || name.find('/') != std::string::npos ||
      name.find('\0') != std::string::npos) {
    return FieldError(where, key, PreviewJson(name), "a file name inside the directory");
  }
  return ReadNpy(absl::StrCat(directory, "/", name));
}

absl::StatusOr<std::vector<float>> ReadEdges(const Json& manifest, const char* key,
                                             const std::string& where) {
  const auto list = manifest.find(key);
  if (list == manifest.end() || !list->is_array()) {
    return FieldError(where, key, list == manifest.end() ? "(missing)" : PreviewJson(*list),
                      "a list of numbers");
  }
  std::vector<float> edges;
  for (const Json& value : *list) {
    if (!value.is_number() || !std::isfinite(value.get<float>())) {
      return FieldError(where, absl::StrCat(key, "[", edges.size(), "]"), PreviewJson(value),
                        "a finite number");
    }
    edges.push_back(value.get<float>());
  }
  return edges;
}

absl::StatusOr<std::vector<int64_t>> ReadBudgets(const Json& manifest, bool has_axis,
                                                 std::optional<int64_t> told,
                                                 const std::string& where) {
  std::vector<int64_t> budgets;
  const auto list = manifest.find("budget_values");
  if (list != manifest.end() && !list->is_null()) {
    if (!list->is_array() || list->empty()) {
      return FieldError(where, "budget_values", PreviewJson(*list), "null or a list of budgets");
    }
    for (const Json& value : *list) {
      if (!value.is_number_integer()) {
        return FieldError(where, "budget_values", PreviewJson(*list), "a list of integers");
      }
      budgets.push_back(value.get<int64_t>());
    }
  }
  if (budgets.empty() && has_axis) {
    return FieldError(where, "budget_values", "(missing)", "one budget per row of the arrays");
  }
  if (budgets.empty()) {
    if (!told.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": budget_values=null, want the budget stated beside the import"));
    }
    return std::vector<int64_t>{*told};
  }
  if (told.has_value() && budgets != std::vector<int64_t>{*told}) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": stated budget=", *told,
                                                   ", want none, the directory states ",
                                                   absl::StrJoin(budgets, ", ")));
  }
  return budgets;
}

absl::Status CheckShape(const NpyArray& array, std::vector<int64_t> want, int64_t num_budgets,
                        bool has_axis, absl::string_view name, const std::string& directory) {
  if (has_axis) want.insert(want.begin(), num_budgets);
  if (array.shape == want) return absl::OkStatus();
  return FieldError(absl::StrCat(directory, ": ", name), "shape",
                    absl::StrCat("[", absl::StrJoin(array.shape, ", "), "]"),
                    absl::StrCat("[", absl::StrJoin(want, ", "), "]"));
}

std::string AlgorithmJson(const Json& manifest) {
  Json algorithm = Json::object();
  if (const auto cql = manifest.find("cql"); cql != manifest.end() && cql->is_object()) {
    algorithm = *cql;
  }
  if (manifest.contains("algorithm")) algorithm["name"] = manifest["algorithm"];
  for (const absl::string_view key : kAlgorithmKeys) {
    const auto value = manifest.find(std::string(key));
    if (value != manifest.end()) algorithm[std::string(key)] = *value;
  }
  return algorithm.dump();
}

absl::StatusOr<std::string> ProvenanceJson(const Json& manifest, const std::string& where) {
  Json provenance = {{"source", manifest["source"]},
                     {"imported_from", "reference directory, format_version 2"}};
  KEEPSET_ASSIGN_OR_RETURN(const std::optional<std::string> digest,
                           OptionalStringField(manifest, "input_sha256", where));
  if (digest.has_value()) provenance["calibration_digest"] = absl::StrCat("sha256:", *digest);
  for (const absl::string_view key : kProvenanceKeys) {
    const auto value = manifest.find(std::string(key));
    if (value != manifest.end()) provenance[std::string(key)] = *value;
  }
  return provenance.dump();
}

// The range of the action grid a manifest states, for tables compiled on another grid than the
// usual one, with room for the value of states without records; nothing where none is stated.
absl::StatusOr<std::optional<std::pair<float, float>>> ActionRange(const Json& manifest,
                                                                   const char* key,
                                                                   float unsupported,
                                                                   const std::string& where) {
  const auto actions = manifest.find(key);
  if (actions == manifest.end() || !actions->is_array() || actions->empty()) return std::nullopt;
  std::pair<float, float> range = {unsupported, unsupported};
  for (size_t i = 0; i < actions->size(); ++i) {
    const Json& action = (*actions)[i];
    const double value = action.is_number() ? action.get<double>() : NAN;
    if (!(std::abs(value) <= std::numeric_limits<float>::max())) {
      return FieldError(where, absl::StrCat(key, "[", i, "]"), PreviewJson(action),
                        "a finite number of 32 bits");
    }
    range.first = std::min(range.first, static_cast<float>(value));
    range.second = std::max(range.second, static_cast<float>(value));
  }
  return range;
}

}  // namespace

absl::StatusOr<CompilerKvTableContent> ImportReferenceDirectory(const std::string& directory,
                                                                const ImportOptions& options) {
  const std::string where = absl::StrCat(directory, "/manifest.json");
  KEEPSET_ASSIGN_OR_RETURN(const Json manifest, ReadManifest(where));
  KEEPSET_RETURN_IF_ERROR(
      IntField(manifest, "format_version", kReferenceVersion, kReferenceVersion, where).status());
  KEEPSET_RETURN_IF_ERROR(CheckSource(manifest, where));
  KEEPSET_RETURN_IF_ERROR(
      CheckCount(manifest, "canonical_layers", "num_layers", options.model.num_layers, where));
  KEEPSET_RETURN_IF_ERROR(
      CheckCount(manifest, "num_heads", "num_qo_heads", options.model.num_qo_heads, where));

  KEEPSET_ASSIGN_OR_RETURN(NpyArray heads,
                           ReadArray(manifest, directory, "head_table", "W_head.npy", where));
  KEEPSET_ASSIGN_OR_RETURN(NpyArray gates,
                           ReadArray(manifest, directory, "gate_table", "T_gate.npy", where));
  const bool has_axis = heads.shape.size() == 3;
  if (has_axis != (gates.shape.size() == 4)) {
    return absl::InvalidArgumentError(
        absl::StrCat(directory, ": W_head has ", heads.shape.size(), " and T_gate ",
                     gates.shape.size(), " dimensions, want 2 and 3, or 3 and 4 with budgets"));
  }

  CompilerKvTableContent content;
  content.name = options.name;
  content.version = options.version;
  content.model = options.model;
  KEEPSET_ASSIGN_OR_RETURN(content.entropy_edges, ReadEdges(manifest, "entropy_edges", where));
  KEEPSET_ASSIGN_OR_RETURN(content.ppl_edges, ReadEdges(manifest, "ppl_edges", where));
  KEEPSET_ASSIGN_OR_RETURN(content.budgets, ReadBudgets(manifest, has_axis, options.budget, where));
  const auto num_budgets = static_cast<int64_t>(content.budgets.size());
  if (!has_axis && num_budgets != 1) {
    return FieldError(where, "budget_values", absl::StrJoin(content.budgets, ", "),
                      "one budget, the arrays have no budget axis");
  }
  KEEPSET_RETURN_IF_ERROR(CheckShape(heads, {options.model.num_layers, options.model.num_qo_heads},
                                     num_budgets, has_axis, "W_head", directory));
  KEEPSET_RETURN_IF_ERROR(
      CheckShape(gates,
                 {options.model.num_layers, static_cast<int64_t>(content.entropy_edges.size()) + 1,
                  static_cast<int64_t>(content.ppl_edges.size()) + 1},
                 num_budgets, has_axis, "T_gate", directory));
  content.head_weights = std::move(heads.values);
  content.gate_thresholds = std::move(gates.values);
  content.algorithm_json = AlgorithmJson(manifest);
  KEEPSET_ASSIGN_OR_RETURN(content.provenance_json, ProvenanceJson(manifest, where));
  KEEPSET_ASSIGN_OR_RETURN(content.head_grid,
                           ActionRange(manifest, "head_actions", kUnsupportedHeadWeight, where));
  KEEPSET_ASSIGN_OR_RETURN(content.gate_grid,
                           ActionRange(manifest, "gate_actions", kUnsupportedGate, where));
  KEEPSET_RETURN_IF_ERROR(SerializeTable(content).status());
  return content;
}

}  // namespace keepset::tables
