#include "tables/observation_heads_table.h"

#include <cmath>
#include <memory>
#include <set>
#include <tuple>
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

constexpr int64_t kMaxPoolKernel = 1023;
constexpr int64_t kMaxDilate = 4096;
constexpr std::size_t kMaxProbeNameBytes = 128;
constexpr std::size_t kMaxProbeTextBytes = 4096;
constexpr std::size_t kMaxRiskPoints = 1024;

constexpr absl::string_view kRowsNames[kNumObservedRows] = {
    "last_row", "max_rows", "mean_rows", "probe_max", "probe_mean", "key_novelty"};

struct ObservationHeadsValues {
  std::vector<HeadObservation> observations;  // [M]
  ObservationSettings settings;
};

class ParsedObservationHeadsTable final : public FileTable<ObservationHeadsTable> {
 public:
  ParsedObservationHeadsTable(std::shared_ptr<const SafetensorsFile> file, TableHeader header,
                              TableBudgets budgets, ObservationHeadsValues values)
      : FileTable(std::move(file), std::move(header), std::move(budgets)),
        values_(std::move(values)) {}

  absl::string_view kind() const override { return "observation_heads"; }
  const ObservationHeadsTable* AsObservationHeads() const override { return this; }

  absl::Span<const HeadObservation> observations() const override { return values_.observations; }
  const ObservationSettings& settings() const override { return values_.settings; }

 private:
  const ObservationHeadsValues values_;
};

absl::Status ElementError(const SafetensorsFile& file, absl::string_view tensor, std::size_t index,
                          absl::string_view value, absl::string_view want) {
  return FieldError(TensorWhere(file, tensor), absl::StrCat("element[", index, "]"), value, want);
}

absl::Status CheckWeight(const SafetensorsFile& file, std::size_t index, float weight) {
  if (weight >= 0.0f) return absl::OkStatus();
  return ElementError(file, "weights", index, absl::StrCat(weight), "at least 0");
}

absl::StatusOr<std::vector<HeadObservation>> ReadObservations(const SafetensorsFile& file,
                                                              const ModelFingerprint& model) {
  KEEPSET_ASSIGN_OR_RETURN(const TensorInfo* heads_info,
                           RequireTensor(file, "heads", TensorDType::kI32, 2));
  KEEPSET_ASSIGN_OR_RETURN(const TensorInfo* weights_info,
                           RequireTensor(file, "weights", TensorDType::kF32, 1));
  KEEPSET_ASSIGN_OR_RETURN(const TensorInfo* rows_info,
                           RequireTensor(file, "rows", TensorDType::kI32, 1));
  const int64_t count = heads_info->shape[0];
  if (count == 0) {
    return FieldError(TensorWhere(file, "heads"), "shape", "[0, 2]", "at least one observation");
  }
  KEEPSET_RETURN_IF_ERROR(
      RequireShape(file, *heads_info, {count, 2}, "(observations; layer, head)"));
  KEEPSET_RETURN_IF_ERROR(RequireShape(file, *weights_info, {count}, "(observations of heads)"));
  KEEPSET_RETURN_IF_ERROR(RequireShape(file, *rows_info, {count}, "(observations of heads)"));
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<int64_t> heads, ReadInts(file, *heads_info));
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<float> weights, ReadFloats(file, *weights_info));
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<int64_t> rows, ReadInts(file, *rows_info));

  std::vector<HeadObservation> observations;
  std::set<std::tuple<int64_t, int64_t, ObservedRows>> seen;
  bool any_weight = false;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    KEEPSET_ASSIGN_OR_RETURN(
        const HeadObservation one,
        CheckedObservation(file, model, i, heads[2 * i], heads[2 * i + 1], rows[i], weights[i]));
    if (!seen.emplace(one.layer, one.head, one.rows).second) {
      return ElementError(
          file, "heads", 2 * i, absl::StrCat(one.layer),
          absl::StrCat("each observation once; layer ", one.layer, " head ", one.head, " ",
                       ObservedRowsName(one.rows), " is listed twice"));
    }
    any_weight = any_weight || one.weight > 0.0f;
    observations.push_back(one);
  }
  if (!any_weight) {
    return FieldError(TensorWhere(file, "weights"), "every element", "0", "at least one above 0");
  }
  return observations;
}

absl::StatusOr<std::string> ChoiceField(const Json& object, absl::string_view key,
                                        absl::string_view first, absl::string_view second,
                                        absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(const std::optional<std::string> value,
                           OptionalStringField(object, key, where));
  if (!value.has_value()) return std::string(first);
  if (*value == first || *value == second) return *value;
  return FieldError(where, key, *value, absl::StrCat(first, " or ", second));
}

absl::StatusOr<std::vector<LayerGroup>> ReadLayerGroups(const Json& object, int64_t num_layers,
                                                        absl::string_view where) {
  std::vector<LayerGroup> groups;
  const auto list = object.find("layer_groups");
  if (list == object.end() || list->is_null()) return groups;
  const auto refuse = [&](const Json& value, absl::string_view want) {
    return FieldError(where, "layer_groups", PreviewJson(value), want);
  };
  if (!list->is_array() || list->empty()) return refuse(*list, "a list of [begin, end)");
  int64_t next = 0;
  for (const Json& one : *list) {
    const bool two = one.is_array() && one.size() == 2 && one[0].is_number_integer() &&
                     one[1].is_number_integer();
    if (!two) return refuse(one, "[begin, end)");
    const LayerGroup group = {one[0].get<int64_t>(), one[1].get<int64_t>()};
    if (group.begin != next || group.end <= group.begin || group.end > num_layers) {
      return refuse(one, absl::StrCat("[", next, ", end) with end in ", next + 1, "..", num_layers,
                                      ": groups cover every layer once, in order"));
    }
    groups.push_back(group);
    next = group.end;
  }
  if (next != num_layers) {
    return refuse(*list, absl::StrCat("groups up to layer ", num_layers, ", end of the model"));
  }
  return groups;
}

absl::StatusOr<std::vector<RiskPoint>> ReadRiskCurve(const Json& object, absl::string_view where) {
  std::vector<RiskPoint> curve;
  const auto entry = object.find("risk");
  if (entry == object.end() || entry->is_null()) return curve;
  KEEPSET_ASSIGN_OR_RETURN(const Json risk, ObjectField(object, "risk", where));
  const std::string inside = absl::StrCat(where, ".risk");
  const auto list = risk.find("curve");
  if (list == risk.end() || !list->is_array() || list->empty() || list->size() > kMaxRiskPoints) {
    return FieldError(inside, "curve", list == risk.end() ? "(missing)" : PreviewJson(*list),
                      absl::StrCat("1..", kMaxRiskPoints, " points [outside_mass, miss_rate]"));
  }
  for (const Json& one : *list) {
    const bool two = one.is_array() && one.size() == 2 && one[0].is_number() && one[1].is_number();
    RiskPoint point;
    if (two) point = {one[0].get<double>(), one[1].get<double>()};
    const RiskPoint least = curve.empty() ? RiskPoint{0.0, 0.0} : curve.back();
    const bool ascends =
        point.miss_rate >= least.miss_rate && point.miss_rate <= 1.0 && point.outside_mass <= 1.0 &&
        (curve.empty() ? point.outside_mass >= 0.0 : point.outside_mass > least.outside_mass);
    if (!two || !ascends) {
      return FieldError(inside, "curve", PreviewJson(one),
                        absl::StrCat("[outside_mass, miss_rate] within 0..1, mass ascending and "
                                     "miss rate never falling"));
    }
    curve.push_back(point);
  }
  return curve;
}

absl::StatusOr<ObservationSettings> ReadSettings(const Json& document, int64_t num_layers,
                                                 absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(const Json object, ObjectField(document, "observation_heads", where));
  const std::string inside = absl::StrCat(where, ": observation_heads");
  ObservationSettings settings;
  KEEPSET_ASSIGN_OR_RETURN(const std::optional<int64_t> pool_kernel,
                           OptionalIntField(object, "pool_kernel", 1, kMaxPoolKernel, inside));
  settings.pool_kernel = pool_kernel.value_or(1);
  if (settings.pool_kernel % 2 == 0) {
    return FieldError(inside, "pool_kernel", absl::StrCat(settings.pool_kernel), "an odd number");
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::optional<int64_t> dilate,
                           OptionalIntField(object, "dilate", 0, kMaxDilate, inside));
  settings.dilate = dilate.value_or(0);
  KEEPSET_ASSIGN_OR_RETURN(const std::string merge,
                           ChoiceField(object, "merge", "sum", "max", inside));
  settings.merge =
      absl::string_view(merge) == "max" ? ObservationMerge::kMax : ObservationMerge::kSum;
  KEEPSET_ASSIGN_OR_RETURN(const std::string normalization,
                           ChoiceField(object, "normalization", "max", "sum", inside));
  settings.normalization = absl::string_view(normalization) == "sum"
                               ? ObservationNormalization::kSum
                               : ObservationNormalization::kMax;
  KEEPSET_ASSIGN_OR_RETURN(settings.layer_groups, ReadLayerGroups(object, num_layers, inside));
  KEEPSET_ASSIGN_OR_RETURN(settings.probe, ReadObservationProbe(object, inside));
  KEEPSET_ASSIGN_OR_RETURN(settings.risk_curve, ReadRiskCurve(object, inside));
  return settings;
}

absl::Status CheckTogether(const ObservationHeadsValues& values, absl::string_view where) {
  bool probes = false;
  for (const HeadObservation& one : values.observations) {
    probes = probes || (one.weight > 0.0f && NeedsProbeRows(one.rows));
  }
  if (probes && !values.settings.probe.has_value()) {
    return FieldError(where, "observation_heads.probe", "(missing)",
                      "a name and a text: rows of a probe observe");
  }
  for (const LayerGroup& group : values.settings.layer_groups) {
    bool observed = false;
    for (const HeadObservation& one : values.observations) {
      observed =
          observed || (one.weight > 0.0f && one.layer >= group.begin && one.layer < group.end);
    }
    if (!observed) {
      return FieldError(where, "observation_heads.layer_groups",
                        absl::StrCat("[", group.begin, ", ", group.end, ")"),
                        "at least one observation of weight above 0 in every group");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::string_view ObservedRowsName(ObservedRows rows) {
  return kRowsNames[static_cast<int32_t>(rows)];
}

bool NeedsProbeRows(ObservedRows rows) {
  return rows == ObservedRows::kProbeMax || rows == ObservedRows::kProbeMean;
}

absl::StatusOr<HeadObservation> CheckedObservation(const SafetensorsFile& file,
                                                   const ModelFingerprint& model, std::size_t index,
                                                   int64_t layer, int64_t head, int64_t rows,
                                                   float weight) {
  if (rows < 0 || rows >= kNumObservedRows) {
    return ElementError(
        file, "rows", index, absl::StrCat(rows),
        absl::StrCat("0..", kNumObservedRows - 1, " (", absl::StrJoin(kRowsNames, ", "), ")"));
  }
  const auto observed = static_cast<ObservedRows>(rows);
  const bool is_key = observed == ObservedRows::kKeyNovelty;
  const int64_t num_heads = is_key ? model.num_kv_heads : model.num_qo_heads;
  if (layer < 0 || layer >= model.num_layers) {
    return ElementError(file, "heads", 2 * index, absl::StrCat(layer),
                        absl::StrCat("a layer in 0..", model.num_layers - 1));
  }
  if (head < 0 || head >= num_heads) {
    return ElementError(
        file, "heads", 2 * index + 1, absl::StrCat(head),
        absl::StrCat("a ", is_key ? "KV head" : "query head", " in 0..", num_heads - 1));
  }
  KEEPSET_RETURN_IF_ERROR(CheckWeight(file, index, weight));
  return HeadObservation{layer, head, observed, weight};
}

absl::StatusOr<std::optional<ObservationProbe>> ReadObservationProbe(const Json& object,
                                                                     absl::string_view where) {
  const auto entry = object.find("probe");
  if (entry == object.end() || entry->is_null()) return std::nullopt;
  KEEPSET_ASSIGN_OR_RETURN(const Json probe, ObjectField(object, "probe", where));
  const std::string inside = absl::StrCat(where, ".probe");
  ObservationProbe result;
  KEEPSET_ASSIGN_OR_RETURN(result.name, StringField(probe, "name", inside));
  KEEPSET_ASSIGN_OR_RETURN(result.text, StringField(probe, "text", inside));
  if (result.name.empty() || result.name.size() > kMaxProbeNameBytes) {
    return FieldError(inside, "name", PreviewJson(probe["name"]),
                      absl::StrCat("1..", kMaxProbeNameBytes, " bytes"));
  }
  if (result.text.empty() || result.text.size() > kMaxProbeTextBytes) {
    return FieldError(inside, "text", PreviewJson(probe["text"]),
                      absl::StrCat("1..", kMaxProbeTextBytes, " bytes"));
  }
  return result;
}

absl::StatusOr<std::shared_ptr<const DecisionTable>> ParseObservationHeadsTable(
    std::shared_ptr<const SafetensorsFile> shared_file, TableHeader header) {
  const SafetensorsFile& file = *shared_file;
  const std::string& where = file.label();
  ObservationHeadsValues values;
  KEEPSET_ASSIGN_OR_RETURN(TableBudgets budgets, ReadTableBudgets(file, header.document));
  KEEPSET_ASSIGN_OR_RETURN(values.observations, ReadObservations(file, header.model));
  KEEPSET_ASSIGN_OR_RETURN(values.settings,
                           ReadSettings(header.document, header.model.num_layers, where));
  KEEPSET_RETURN_IF_ERROR(CheckTogether(values, where));
  header.document = nullptr;
  return std::make_shared<const ParsedObservationHeadsTable>(
      std::move(shared_file), std::move(header), std::move(budgets), std::move(values));
}

}  // namespace keepset::tables
