#include "tables/result_file.h"

#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "tables/strict_json.h"

namespace keepset::tables {
namespace {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

constexpr absl::string_view kKvHeadScope = "kv_head";

template <typename T>
OrderedJson OrNull(const std::optional<T>& value) {
  return value.has_value() ? OrderedJson(*value) : OrderedJson(nullptr);
}

// A list per KV head, one number for a shared set, null for nothing.
OrderedJson Counts(const std::vector<int64_t>& counts, bool per_head) {
  if (counts.empty()) return nullptr;
  return per_head ? OrderedJson(counts) : OrderedJson(counts[0]);
}

OrderedJson LayerJson(const ResultLayer& layer, bool per_head) {
  OrderedJson object = {{"candidates", Counts(layer.candidates, per_head)},
                        {"kept", Counts(layer.kept, per_head)},
                        {"filled", Counts(layer.filled, per_head)},
                        {"tau", OrNull(layer.tau)}};
  if (layer.entropy.has_value()) object["entropy"] = *layer.entropy;
  if (layer.entropy_bin.has_value()) object["entropy_bin"] = *layer.entropy_bin;
  return object;
}

// What the document says about the sets: by (layer, set), how many positions.
struct ExpectedSets {
  int64_t seq_len = 0;
  std::map<std::pair<int64_t, int64_t>, int64_t> kept;
};

bool IsCount(const Json& value) { return value.is_number_unsigned(); }

absl::StatusOr<ExpectedSets> ReadExpected(absl::string_view result_json) {
  constexpr absl::string_view kWhere = "result document";
  KEEPSET_ASSIGN_OR_RETURN(const Json document, ParseStrictJsonObject(result_json, kWhere));
  KEEPSET_ASSIGN_OR_RETURN(const std::string format, StringField(document, "format", kWhere));
  if (format != "keepset.result") {
    return FieldError(kWhere, "format", PreviewJson(format), "keepset.result");
  }
  ExpectedSets expected;
  KEEPSET_ASSIGN_OR_RETURN(expected.seq_len, IntField(document, "seq_len", 1, INT32_MAX, kWhere));
  const auto layers = document.find("layers");
  if (layers == document.end() || !layers->is_array() || layers->empty()) {
    return FieldError(kWhere, "layers", layers == document.end() ? "(missing)" : "(empty)",
                      "a list with one entry per layer");
  }
  for (std::size_t l = 0; l < layers->size(); ++l) {
    const Json& entry = (*layers)[l];
    const Json kept = entry.is_object() && entry.contains("kept") ? entry["kept"] : Json(nullptr);
    const auto layer = static_cast<int64_t>(l);
    bool valid = IsCount(kept) || (kept.is_array() && !kept.empty());
    if (IsCount(kept)) expected.kept[{layer, kSharedSet}] = kept.get<int64_t>();
    if (kept.is_array()) {
      for (std::size_t g = 0; g < kept.size(); ++g) {
        valid = valid && IsCount(kept[g]);
        if (valid) expected.kept[{layer, static_cast<int64_t>(g)}] = kept[g].get<int64_t>();
      }
    }
    if (!valid) {
      return FieldError(kWhere, absl::StrCat("layers[", l, "].kept"), PreviewJson(kept),
                        "a count, or a list of counts per KV head");
    }
  }
  return expected;
}

std::string SetName(int64_t layer, absl::string_view tensor, int64_t set) {
  return set == kSharedSet ? absl::StrCat("layers.", layer, ".", tensor)
                           : absl::StrCat("layers.", layer, ".", tensor, ".", set);
}

absl::Status CheckSet(const ResultIndexSet& set, const ExpectedSets& expected) {
  const std::string where = SetName(set.layer, "keep_indices", set.set);
  const auto kept = expected.kept.find({set.layer, set.set});
  if (kept == expected.kept.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": the document lists no such set, want layer and set of its layers"));
  }
  if (static_cast<int64_t>(set.indices.size()) != kept->second) {
    return FieldError(where, "count", absl::StrCat(set.indices.size()),
                      absl::StrCat(kept->second, " as the document's kept"));
  }
  int64_t lowest = 0;
  for (std::size_t i = 0; i < set.indices.size(); ++i) {
    const int64_t position = set.indices[i];
    if (position < lowest || position >= expected.seq_len) {
      return FieldError(where, absl::StrCat("element[", i, "]"), absl::StrCat(position),
                        absl::StrCat(lowest, "..", expected.seq_len - 1, " (strictly ascending)"));
    }
    lowest = position + 1;
  }
  return absl::OkStatus();
}

absl::Status CheckGathered(const ResultGathered& rows, const ExpectedSets& expected) {
  const std::string where = SetName(rows.layer, "k", rows.set);
  const auto kept = expected.kept.find({rows.layer, rows.set});
  if (kept == expected.kept.end() || kept->second != rows.num_tokens) {
    return FieldError(where, "num_tokens", absl::StrCat(rows.num_tokens),
                      "the kept count of a set of the document");
  }
  if (rows.set != kSharedSet && rows.num_kv_heads != 1) {
    return FieldError(where, "num_kv_heads", absl::StrCat(rows.num_kv_heads),
                      "1 for the set of one head");
  }
  return absl::OkStatus();
}

std::vector<int64_t> GatheredShape(const ResultGathered& rows, int64_t head_dim) {
  if (rows.set != kSharedSet) return {rows.num_tokens, head_dim};
  return {rows.num_kv_heads, rows.num_tokens, head_dim};
}

}  // namespace

std::string ResultJson(const ResultDocument& document) {
  const bool per_head = document.scope == kKvHeadScope;
  OrderedJson table = nullptr;
  if (document.table.has_value()) {
    table = OrderedJson{{"name", document.table->name},
                        {"version", document.table->version},
                        {"digest", document.table->digest}};
  }
  OrderedJson layers = OrderedJson::array();
  for (const ResultLayer& layer : document.layers) layers.push_back(LayerJson(layer, per_head));
  OrderedJson object = {{"format", "keepset.result"},
                        {"format_version", 1},
                        {"outcome", document.outcome},
                        {"reason", document.reason},
                        {"policy", document.policy},
                        {"scope", document.scope},
                        {"seq_len", document.seq_len},
                        {"table", table},
                        {"entropy", OrNull(document.entropy)},
                        {"ppl", OrNull(document.ppl)},
                        {"entropy_bin", OrNull(document.entropy_bin)},
                        {"ppl_bin", OrNull(document.ppl_bin)},
                        {"layers", layers},
                        {"defaulted_inputs", document.defaulted_inputs},
                        {"relaxed", document.relaxed},
                        {"backend", document.backend},
                        {"bytes_before", document.bytes_before},
                        {"bytes_after", document.bytes_after}};
  if (document.outside_mass.has_value()) object["outside_mass"] = *document.outside_mass;
  if (document.predicted_miss_rate.has_value()) {
    object["predicted_miss_rate"] = *document.predicted_miss_rate;
  }
  return object.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

absl::StatusOr<std::string> SerializeResult(absl::string_view result_json,
                                            absl::Span<const ResultIndexSet> sets,
                                            absl::Span<const ResultGathered> gathered) {
  KEEPSET_ASSIGN_OR_RETURN(const ExpectedSets expected, ReadExpected(result_json));
  // Wide elements first, so that every tensor stays aligned.
  std::vector<TensorToWrite> tensors;
  for (const ResultIndexSet& set : sets) {
    KEEPSET_RETURN_IF_ERROR(CheckSet(set, expected));
    tensors.push_back(
        {SetName(set.layer, "keep_indices", set.set),
         TensorDType::kI32,
         {static_cast<int64_t>(set.indices.size())},
         absl::Span<const std::byte>(reinterpret_cast<const std::byte*>(set.indices.data()),
                                     set.indices.size() * sizeof(int32_t))});
  }
  if (sets.size() != expected.kept.size()) {
    return FieldError("result", "sets", absl::StrCat(sets.size()),
                      absl::StrCat(expected.kept.size(), ", one per set of the document"));
  }
  for (const ResultGathered& rows : gathered) {
    KEEPSET_RETURN_IF_ERROR(CheckGathered(rows, expected));
    tensors.push_back({SetName(rows.layer, "k", rows.set), rows.dtype,
                       GatheredShape(rows, rows.k_head_dim), rows.k});
    tensors.push_back({SetName(rows.layer, "v", rows.set), rows.dtype,
                       GatheredShape(rows, rows.v_head_dim), rows.v});
  }
  return SerializeSafetensors({{"keepset", std::string(result_json)}}, tensors);
}

absl::Status WriteResultFile(const std::string& path, absl::string_view result_json,
                             absl::Span<const ResultIndexSet> sets,
                             absl::Span<const ResultGathered> gathered) {
  KEEPSET_ASSIGN_OR_RETURN(const std::string bytes, SerializeResult(result_json, sets, gathered));
  return WriteFileAtomically(path, bytes);
}

}  // namespace keepset::tables
