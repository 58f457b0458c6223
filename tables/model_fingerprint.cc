#include "tables/model_fingerprint.h"

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "tables/strict_json.h"

namespace keepset::tables {
namespace {

using Json = nlohmann::json;

std::string Difference(absl::string_view field, absl::string_view table,
                       absl::string_view request) {
  return absl::StrCat(field, " is ", table, " in the table and ", request, " in the request");
}

absl::Status Misfit(absl::string_view difference, absl::string_view relax) {
  return absl::FailedPreconditionError(
      absl::StrCat("table does not fit the model: ", difference, ", want them equal", relax));
}

absl::Status MatchCount(absl::string_view field, int64_t table, int64_t request,
                        absl::string_view relax) {
  if (table == request) return absl::OkStatus();
  return Misfit(Difference(field, absl::StrCat(table), absl::StrCat(request)), relax);
}

std::string Quoted(absl::string_view text) {
  return absl::StrCat("\"", absl::CHexEscape(text), "\"");
}

// As JSON values, so that 10000 and 10000.0 are the same theta.
bool SameRope(const ModelFingerprint& table, const ModelFingerprint& request) {
  if (!table.rope_json.empty() && !request.rope_json.empty()) {
    return Json::parse(table.rope_json, nullptr, false) ==
           Json::parse(request.rope_json, nullptr, false);
  }
  return !table.rope_theta.has_value() || !request.rope_theta.has_value() ||
         *table.rope_theta == *request.rope_theta;
}

std::string RopeText(const ModelFingerprint& model) {
  return model.rope_json.empty() ? absl::StrCat("theta ", model.rope_theta.value_or(0))
                                 : model.rope_json;
}

// Each nothing when the two agree.
std::optional<std::string> ArchitectureDifference(const ModelFingerprint& table,
                                                  const ModelFingerprint& request) {
  if (table.architecture == request.architecture) return std::nullopt;
  return Difference("architecture", Quoted(table.architecture), Quoted(request.architecture));
}

std::optional<std::string> RopeDifference(const ModelFingerprint& table,
                                          const ModelFingerprint& request) {
  if (SameRope(table, request)) return std::nullopt;
  return Difference("rope", RopeText(table), RopeText(request));
}

std::optional<std::string> RevisionDifference(const ModelFingerprint& table,
                                              const ModelFingerprint& request) {
  if (table.revision.empty() || request.revision.empty() || table.revision == request.revision) {
    return std::nullopt;
  }
  return Difference("revision", Quoted(table.revision), Quoted(request.revision));
}

}  // namespace

std::vector<std::string> ShapeRelaxations(const ModelFingerprint& table,
                                          const ModelFingerprint& request) {
  std::vector<std::string> relaxed;
  for (const auto& difference :
       {ArchitectureDifference(table, request), RopeDifference(table, request),
        RevisionDifference(table, request)}) {
    if (difference.has_value()) relaxed.push_back(absl::StrCat("fingerprint_match: ", *difference));
  }
  return relaxed;
}

absl::Status MatchFingerprint(const ModelFingerprint& table, const ModelFingerprint& request,
                              FingerprintMatch fingerprint_match, LayerMatch layer_match) {
  constexpr absl::string_view kRelaxShape = " (or ask for fingerprint_match=shape)";
  const bool full = fingerprint_match == FingerprintMatch::kFull;
  if (full) {
    const auto architecture = ArchitectureDifference(table, request);
    if (architecture.has_value()) return Misfit(*architecture, kRelaxShape);
  }
  if (layer_match == LayerMatch::kExact) {
    KEEPSET_RETURN_IF_ERROR(MatchCount("num_layers", table.num_layers, request.num_layers,
                                       " (or ask for layer_match=interpolate_depth)"));
  }
  KEEPSET_RETURN_IF_ERROR(MatchCount("num_qo_heads", table.num_qo_heads, request.num_qo_heads, ""));
  KEEPSET_RETURN_IF_ERROR(MatchCount("num_kv_heads", table.num_kv_heads, request.num_kv_heads, ""));
  KEEPSET_RETURN_IF_ERROR(MatchCount("head_dim", table.head_dim, request.head_dim, ""));
  if (full) {
    const auto rope = RopeDifference(table, request);
    if (rope.has_value()) return Misfit(*rope, kRelaxShape);
    const auto revision = RevisionDifference(table, request);
    if (revision.has_value()) return Misfit(*revision, kRelaxShape);
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelFingerprint> ParseModelFingerprint(absl::string_view json,
                                                       absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(const Json object, ParseStrictJsonObject(json, where));
  ModelFingerprint model;
  KEEPSET_ASSIGN_OR_RETURN(const std::optional<std::string> architecture,
                           OptionalStringField(object, "architecture", where));
  model.architecture = architecture.value_or("");
  KEEPSET_ASSIGN_OR_RETURN(model.num_layers,
                           IntField(object, "num_layers", 1, kMaxModelLayers, where));
  KEEPSET_ASSIGN_OR_RETURN(model.num_qo_heads,
                           IntField(object, "num_qo_heads", 1, kMaxModelHeads, where));
  KEEPSET_ASSIGN_OR_RETURN(model.num_kv_heads,
                           IntField(object, "num_kv_heads", 1, kMaxModelHeads, where));
  KEEPSET_ASSIGN_OR_RETURN(model.head_dim, IntField(object, "head_dim", 1, kMaxHeadDim, where));
  if (model.num_qo_heads % model.num_kv_heads != 0) {
    return FieldError(where, "num_qo_heads", absl::StrCat(model.num_qo_heads),
                      absl::StrCat("a multiple of num_kv_heads=", model.num_kv_heads));
  }
  if (const auto rope = object.find("rope"); rope != object.end() && !rope->is_null()) {
    if (!rope->is_object()) return FieldError(where, "rope", PreviewJson(*rope), "an object");
    KEEPSET_ASSIGN_OR_RETURN(model.rope_theta,
                             OptionalFiniteField(*rope, "theta", absl::StrCat(where, ": rope")));
    model.rope_json = rope->dump();
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::optional<std::string> revision,
                           OptionalStringField(object, "revision", where));
  model.revision = revision.value_or("");
  return model;
}

std::string ModelFingerprintJson(const ModelFingerprint& fingerprint) {
  Json object = {{"architecture", fingerprint.architecture},
                 {"num_layers", fingerprint.num_layers},
                 {"num_qo_heads", fingerprint.num_qo_heads},
                 {"num_kv_heads", fingerprint.num_kv_heads},
                 {"head_dim", fingerprint.head_dim}};
  if (!fingerprint.rope_json.empty()) {
    object["rope"] = Json::parse(fingerprint.rope_json, nullptr, false);
  } else if (fingerprint.rope_theta.has_value()) {
    object["rope"] = {{"theta", *fingerprint.rope_theta}};
  }
  if (!fingerprint.revision.empty()) object["revision"] = fingerprint.revision;
  return object.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace keepset::tables
