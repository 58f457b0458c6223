#include "service/registry/registry_document.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "nlohmann/json.hpp"
#include "tables/strict_json.h"

namespace keepset::service {
namespace {

using Json = nlohmann::json;
using tables::FieldError;
using tables::IntField;
using tables::ObjectField;
using tables::PreviewJson;
using tables::StringField;

constexpr absl::string_view kFormat = "keepset.registry";
constexpr int64_t kNewestVersion = 1;

// Whole microseconds: more than people or the order of activations need.
int64_t ToWire(absl::Time time) { return absl::ToUnixMicros(time); }

Json TargetJson(const TableTarget& target) {
  return {{"version", target.version}, {"digest", target.digest}};
}

Json AssignmentJson(const LineAssignment& assignment) {
  Json json = {{"mode", assignment.mode == LineMode::kChosen ? "chosen" : "newest"}};
  if (assignment.active.has_value()) json["active"] = TargetJson(*assignment.active);
  if (assignment.canary.has_value()) {
    json["canary"] = TargetJson(assignment.canary->target);
    json["canary"]["basis_points"] = assignment.canary->basis_points;
    json["canary"]["salt"] = assignment.canary->salt;
  }
  json["aliases"] = Json::object();
  for (const auto& [alias, target] : assignment.aliases)
    json["aliases"][alias] = TargetJson(target);
  json["history"] = Json::array();
  for (const Activation& entry : assignment.history) {
    Json line = TargetJson(entry.target);
    line["time_us"] = ToWire(entry.time);
    line["actor"] = entry.actor;
    line["cause"] = entry.cause;
    line["undone"] = entry.undone;
    json["history"].push_back(std::move(line));
  }
  return json;
}

Json StoredJson(const StoredTable& table) {
  Json json = TargetJson(table.target);
  json["name"] = table.name;
  json["retired"] = table.retired;
  json["loaded_us"] = ToWire(table.loaded);
  json["holders"] = Json::object();
  for (const auto& [source, holder] : table.holders) {
    json["holders"][source] = {
        {"origin", holder.origin},
        {"rule", holder.rule == ActivationRule::kNewest ? "newest" : "on_request"}};
  }
  return json;
}

// File names are made of digests.
absl::StatusOr<std::string> DigestField(const Json& json, absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(std::string digest, StringField(json, "digest", where));
  constexpr absl::string_view kPrefix = "sha256:";
  const absl::string_view hex =
      absl::string_view(digest).substr(std::min(digest.size(), kPrefix.size()));
  const bool valid = digest.substr(0, kPrefix.size()) == kPrefix && hex.size() == 64 &&
                     std::all_of(hex.begin(), hex.end(), [](char c) {
                       return absl::ascii_isdigit(c) || (c >= 'a' && c <= 'f');
                     });
  if (!valid) return FieldError(where, "digest", PreviewJson(json["digest"]), "sha256:<64 hex>");
  return digest;
}

absl::StatusOr<TableTarget> ParseTarget(const Json& json, absl::string_view where) {
  TableTarget target;
  KEEPSET_ASSIGN_OR_RETURN(target.version, StringField(json, "version", where));
  KEEPSET_ASSIGN_OR_RETURN(target.digest, DigestField(json, where));
  return target;
}

absl::StatusOr<bool> BoolField(const Json& json, absl::string_view key, absl::string_view where) {
  const auto it = json.find(std::string(key));
  if (it == json.end() || !it->is_boolean()) {
    return FieldError(where, key, it == json.end() ? "(missing)" : PreviewJson(*it),
                      "true or false");
  }
  return it->get<bool>();
}

absl::StatusOr<absl::Time> TimeField(const Json& json, absl::string_view key,
                                     absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(const int64_t micros,
                           IntField(json, key, 0, std::numeric_limits<int64_t>::max() / 2, where));
  return absl::FromUnixMicros(micros);
}

absl::StatusOr<Activation> ParseActivation(const Json& json, absl::string_view where) {
  if (!json.is_object()) return FieldError(where, "history", PreviewJson(json), "objects");
  Activation entry;
  KEEPSET_ASSIGN_OR_RETURN(entry.target, ParseTarget(json, where));
  KEEPSET_ASSIGN_OR_RETURN(entry.time, TimeField(json, "time_us", where));
  KEEPSET_ASSIGN_OR_RETURN(entry.actor, StringField(json, "actor", where));
  KEEPSET_ASSIGN_OR_RETURN(entry.cause, StringField(json, "cause", where));
  KEEPSET_ASSIGN_OR_RETURN(entry.undone, BoolField(json, "undone", where));
  return entry;
}

absl::StatusOr<LineAssignment> ParseAssignment(const Json& json, absl::string_view where) {
  if (!json.is_object()) return FieldError(where, "line", PreviewJson(json), "an object");
  LineAssignment assignment;
  KEEPSET_ASSIGN_OR_RETURN(const std::string mode, StringField(json, "mode", where));
  if (mode != "chosen" && mode != "newest") {
    return FieldError(where, "mode", PreviewJson(json["mode"]), "chosen or newest");
  }
  assignment.mode = mode == "chosen" ? LineMode::kChosen : LineMode::kNewest;
  if (json.contains("active")) {
    KEEPSET_ASSIGN_OR_RETURN(const Json active, ObjectField(json, "active", where));
    KEEPSET_ASSIGN_OR_RETURN(assignment.active, ParseTarget(active, where));
  }
  if (json.contains("canary")) {
    KEEPSET_ASSIGN_OR_RETURN(const Json wire, ObjectField(json, "canary", where));
    Canary canary;
    KEEPSET_ASSIGN_OR_RETURN(canary.target, ParseTarget(wire, where));
    KEEPSET_ASSIGN_OR_RETURN(canary.basis_points, IntField(wire, "basis_points", 1, 10000, where));
    KEEPSET_ASSIGN_OR_RETURN(canary.salt, StringField(wire, "salt", where));
    assignment.canary = std::move(canary);
  }
  KEEPSET_ASSIGN_OR_RETURN(const Json aliases, ObjectField(json, "aliases", where));
  for (const auto& [alias, wire] : aliases.items()) {
    if (!wire.is_object()) return FieldError(where, "aliases", PreviewJson(wire), "objects");
    KEEPSET_ASSIGN_OR_RETURN(assignment.aliases[alias], ParseTarget(wire, where));
  }
  const auto history = json.find("history");
  if (history == json.end() || !history->is_array() || history->size() > kMaxHistory) {
    return FieldError(where, "history", history == json.end() ? "(missing)" : PreviewJson(*history),
                      absl::StrCat("a list of at most ", kMaxHistory));
  }
  for (const Json& entry : *history) {
    KEEPSET_ASSIGN_OR_RETURN(Activation activation, ParseActivation(entry, where));
    assignment.history.push_back(std::move(activation));
  }
  return assignment;
}

absl::StatusOr<StoredTable> ParseStored(const Json& json, absl::string_view where) {
  if (!json.is_object()) return FieldError(where, "tables", PreviewJson(json), "objects");
  StoredTable table;
  KEEPSET_ASSIGN_OR_RETURN(table.name, StringField(json, "name", where));
  KEEPSET_ASSIGN_OR_RETURN(table.target, ParseTarget(json, where));
  KEEPSET_ASSIGN_OR_RETURN(table.retired, BoolField(json, "retired", where));
  KEEPSET_ASSIGN_OR_RETURN(table.loaded, TimeField(json, "loaded_us", where));
  KEEPSET_ASSIGN_OR_RETURN(const Json holders, ObjectField(json, "holders", where));
  for (const auto& [source, wire] : holders.items()) {
    if (!wire.is_object()) return FieldError(where, "holders", PreviewJson(wire), "objects");
    Holder holder;
    KEEPSET_ASSIGN_OR_RETURN(holder.origin, StringField(wire, "origin", where));
    KEEPSET_ASSIGN_OR_RETURN(const std::string rule, StringField(wire, "rule", where));
    if (rule != "newest" && rule != "on_request") {
      return FieldError(where, "rule", PreviewJson(wire["rule"]), "newest or on_request");
    }
    holder.rule = rule == "newest" ? ActivationRule::kNewest : ActivationRule::kOnRequest;
    table.holders[source] = std::move(holder);
  }
  return table;
}

absl::StatusOr<SharedRevisions> ParseShared(const Json& json, absl::string_view where) {
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max() / 2;
  SharedRevisions shared;
  KEEPSET_ASSIGN_OR_RETURN(shared.source, StringField(json, "source", where));
  KEEPSET_ASSIGN_OR_RETURN(shared.revision, IntField(json, "revision", 0, kLargest, where));
  KEEPSET_ASSIGN_OR_RETURN(const Json lines, ObjectField(json, "lines", where));
  for (const auto& [name, revision] : lines.items()) {
    KEEPSET_ASSIGN_OR_RETURN(shared.lines[name], IntField(lines, name, 0, kLargest, where));
  }
  return shared;
}

}  // namespace

std::string SerializeRegistryDocument(const RegistryDocument& document) {
  Json json = {{"format", kFormat},
               {"format_version", kNewestVersion},
               {"revision_limit", document.revision_limit},
               {"lines", Json::object()},
               {"tables", Json::array()}};
  for (const auto& [name, assignment] : document.lines) {
    json["lines"][name] = AssignmentJson(assignment);
  }
  for (const StoredTable& table : document.tables) json["tables"].push_back(StoredJson(table));
  if (document.shared.has_value()) {
    json["shared"] = {{"source", document.shared->source},
                      {"revision", document.shared->revision},
                      {"lines", document.shared->lines}};
  }
  return absl::StrCat(json.dump(1, ' ', false, Json::error_handler_t::replace), "\n");
}

absl::StatusOr<RegistryDocument> ParseRegistryDocument(absl::string_view text,
                                                       absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(const Json json, tables::ParseStrictJsonObject(text, where));
  KEEPSET_ASSIGN_OR_RETURN(const std::string format, StringField(json, "format", where));
  if (format != kFormat) return FieldError(where, "format", PreviewJson(format), kFormat);
  KEEPSET_ASSIGN_OR_RETURN(
      const int64_t version,
      IntField(json, "format_version", 1, std::numeric_limits<int64_t>::max(), where));
  if (version > kNewestVersion) {
    return absl::FailedPreconditionError(absl::StrCat(where, ": format_version=", version,
                                                      ", want at most ", kNewestVersion,
                                                      "; written by a newer version"));
  }
  RegistryDocument document;
  KEEPSET_ASSIGN_OR_RETURN(
      document.revision_limit,
      IntField(json, "revision_limit", 0, std::numeric_limits<int64_t>::max() / 2, where));
  KEEPSET_ASSIGN_OR_RETURN(const Json lines, ObjectField(json, "lines", where));
  for (const auto& [name, wire] : lines.items()) {
    KEEPSET_ASSIGN_OR_RETURN(
        document.lines[name],
        ParseAssignment(wire, absl::StrCat(where, ": lines.", PreviewJson(Json(name)))));
  }
  const auto stored = json.find("tables");
  if (stored == json.end() || !stored->is_array()) {
    return FieldError(where, "tables", stored == json.end() ? "(missing)" : PreviewJson(*stored),
                      "a list");
  }
  for (size_t i = 0; i < stored->size(); ++i) {
    KEEPSET_ASSIGN_OR_RETURN(StoredTable table,
                             ParseStored((*stored)[i], absl::StrCat(where, ": tables[", i, "]")));
    document.tables.push_back(std::move(table));
  }
  if (json.contains("shared")) {
    KEEPSET_ASSIGN_OR_RETURN(const Json shared, ObjectField(json, "shared", where));
    KEEPSET_ASSIGN_OR_RETURN(document.shared, ParseShared(shared, absl::StrCat(where, ": shared")));
  }
  return document;
}

}  // namespace keepset::service
