#include "service/registry/etcd/etcd_layout.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"
#include "base/status_macros.h"
#include "tables/strict_json.h"

namespace keepset::service::etcd {
namespace {

using nlohmann::json;

constexpr absl::string_view kTables = "tables/";
constexpr absl::string_view kSignatures = "signatures/";
constexpr absl::string_view kLines = "lines/";
constexpr absl::string_view kDigestPrefix = "sha256:";
constexpr size_t kDigestHex = 64;
constexpr size_t kHeaderLengthBytes = 8;
constexpr double kBasisPointsPerPercent = 100;
constexpr int kAllBasisPoints = 10000;

std::string Escape(absl::string_view part) { return absl::StrReplaceAll(part, {{"/", "%2F"}}); }

std::string Unescape(absl::string_view part) {
  return absl::StrReplaceAll(part, {{"%2F", "/"}, {"%2f", "/"}});
}

bool IsDigest(absl::string_view text) {
  if (!absl::ConsumePrefix(&text, kDigestPrefix) || text.size() != kDigestHex) return false;
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return absl::ascii_isdigit(c) || (c >= 'a' && c <= 'f'); });
}

absl::StatusOr<std::string> DigestField(const json& object, absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(std::string digest, tables::StringField(object, "digest", where));
  if (!IsDigest(digest)) {
    return tables::FieldError(where, "digest", tables::PreviewJson(digest),
                              "sha256: and 64 lower-case hex digits");
  }
  return digest;
}

absl::StatusOr<TableTarget> ParseTarget(const json& object, const std::string& where) {
  TableTarget target;
  KEEPSET_ASSIGN_OR_RETURN(target.version, tables::StringField(object, "version", where));
  if (object.contains("digest")) {
    KEEPSET_ASSIGN_OR_RETURN(target.digest, DigestField(object, where));
  }
  return target;
}

json TargetJson(const TableTarget& target) {
  return {{"version", target.version}, {"digest", target.digest}};
}

absl::StatusOr<Canary> ParseCanary(const json& object, const std::string& where) {
  Canary canary;
  KEEPSET_ASSIGN_OR_RETURN(canary.target, ParseTarget(object, where));
  KEEPSET_ASSIGN_OR_RETURN(const double percent, tables::FiniteField(object, "percent", where));
  const double basis_points = std::round(percent * kBasisPointsPerPercent);
  if (basis_points < 1 || basis_points > kAllBasisPoints) {
    return tables::FieldError(where, "percent", absl::StrCat(percent), "0.01..100");
  }
  canary.basis_points = static_cast<int>(basis_points);
  KEEPSET_ASSIGN_OR_RETURN(std::optional<std::string> salt,
                           tables::OptionalStringField(object, "salt", where));
  canary.salt = std::move(salt).value_or("");
  return canary;
}

absl::StatusOr<Activation> ParseActivation(const json& object, const std::string& where) {
  if (!object.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": ", tables::PreviewJson(object), ", want an object"));
  }
  Activation activation;
  KEEPSET_ASSIGN_OR_RETURN(activation.target, ParseTarget(object, where));
  KEEPSET_ASSIGN_OR_RETURN(const std::string time, tables::StringField(object, "time", where));
  std::string problem;
  if (!absl::ParseTime(absl::RFC3339_full, time, &activation.time, &problem)) {
    return tables::FieldError(where, "time", tables::PreviewJson(time), "RFC 3339");
  }
  KEEPSET_ASSIGN_OR_RETURN(std::optional<std::string> actor,
                           tables::OptionalStringField(object, "actor", where));
  KEEPSET_ASSIGN_OR_RETURN(std::optional<std::string> cause,
                           tables::OptionalStringField(object, "cause", where));
  activation.actor = std::move(actor).value_or("");
  activation.cause = std::move(cause).value_or("etcd");
  const auto undone = object.find("undone");
  activation.undone = undone != object.end() && undone->is_boolean() && undone->get<bool>();
  return activation;
}

absl::StatusOr<LineMode> ParseMode(const json& object, absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(const std::optional<std::string> mode,
                           tables::OptionalStringField(object, "mode", where));
  if (!mode.has_value() || *mode == "chosen") return LineMode::kChosen;
  if (*mode == "newest") return LineMode::kNewest;
  return tables::FieldError(where, "mode", tables::PreviewJson(*mode), "chosen or newest");
}

// `object[key]` when it is there and not null; InvalidArgument when it is of another type.
absl::StatusOr<const json*> Optional(const json& object, const char* key, json::value_t type,
                                     absl::string_view where) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return nullptr;
  if (found->type() != type) {
    return tables::FieldError(where, key, tables::PreviewJson(*found),
                              type == json::value_t::array ? "a list" : "an object");
  }
  return &*found;
}

}  // namespace

Layout::Layout(absl::string_view prefix)
    : root_(absl::StrCat(absl::StripSuffix(prefix, "/"), "/")) {}

std::string Layout::TableKey(absl::string_view name, absl::string_view version) const {
  return absl::StrCat(root_, kTables, Escape(name), "/", Escape(version));
}

std::string Layout::SignatureKey(absl::string_view name, absl::string_view version) const {
  return absl::StrCat(root_, kSignatures, Escape(name), "/", Escape(version));
}

std::string Layout::LineKey(absl::string_view name) const {
  return absl::StrCat(root_, kLines, Escape(name));
}

absl::StatusOr<Key> Layout::Parse(absl::string_view key) const {
  absl::string_view rest = absl::StripPrefix(key, root_);
  const bool is_signature = absl::StartsWith(rest, kSignatures);
  if (absl::ConsumePrefix(&rest, kTables) || absl::ConsumePrefix(&rest, kSignatures)) {
    const std::vector<absl::string_view> parts = absl::StrSplit(rest, '/');
    if (parts.size() == 2 && !parts[0].empty() && !parts[1].empty()) {
      return Key{is_signature ? Key::Kind::kSignature : Key::Kind::kTable, Unescape(parts[0]),
                 Unescape(parts[1])};
    }
  } else if (absl::ConsumePrefix(&rest, kLines)) {
    if (!rest.empty() && !absl::StrContains(rest, '/')) {
      return Key{Key::Kind::kLine, Unescape(rest), ""};
    }
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "etcd key \"", absl::CHexEscape(key), "\", want ", root_, "tables/NAME/VERSION, ", root_,
      "signatures/NAME/VERSION or ", root_, "lines/NAME, a slash in a name written %2F"));
}

bool IsTablePointer(absl::string_view value) {
  return absl::StartsWith(absl::StripLeadingAsciiWhitespace(value), "{") &&
         value.substr(0, kHeaderLengthBytes).find('\0') == absl::string_view::npos;
}

absl::StatusOr<TablePointer> ParseTablePointer(absl::string_view value, absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(const json document, tables::ParseStrictJsonObject(value, where));
  TablePointer pointer;
  KEEPSET_ASSIGN_OR_RETURN(pointer.digest, DigestField(document, where));
  KEEPSET_ASSIGN_OR_RETURN(pointer.path, tables::StringField(document, "path", where));
  const std::vector<absl::string_view> parts = absl::StrSplit(pointer.path, '/');
  if (pointer.path.empty() || pointer.path.find('\0') != std::string::npos ||
      std::any_of(parts.begin(), parts.end(),
                  [](absl::string_view part) { return part.empty() || part == ".."; })) {
    return tables::FieldError(where, "path", tables::PreviewJson(pointer.path),
                              "a path below the shared directory, without ..");
  }
  return pointer;
}

std::string SerializeTablePointer(const TablePointer& pointer) {
  return json{{"digest", pointer.digest}, {"path", pointer.path}}.dump();
}

absl::StatusOr<LineAssignment> ParseLine(absl::string_view value, absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(const json document, tables::ParseStrictJsonObject(value, where));
  LineAssignment line;
  KEEPSET_ASSIGN_OR_RETURN(line.mode, ParseMode(document, where));
  KEEPSET_ASSIGN_OR_RETURN(const json* stable,
                           Optional(document, "stable", json::value_t::object, where));
  if (stable != nullptr) {
    KEEPSET_ASSIGN_OR_RETURN(line.active, ParseTarget(*stable, absl::StrCat(where, ": stable")));
  }
  KEEPSET_ASSIGN_OR_RETURN(const json* canary,
                           Optional(document, "canary", json::value_t::object, where));
  if (canary != nullptr) {
    KEEPSET_ASSIGN_OR_RETURN(line.canary, ParseCanary(*canary, absl::StrCat(where, ": canary")));
  }
  KEEPSET_ASSIGN_OR_RETURN(const json* aliases,
                           Optional(document, "aliases", json::value_t::object, where));
  if (aliases != nullptr) {
    for (const auto& [alias, target] : aliases->items()) {
      const std::string field = absl::StrCat(where, ": aliases.", absl::CHexEscape(alias));
      if (alias.empty() || alias == kStableAlias || alias == kCanaryAlias) {
        return absl::InvalidArgumentError(
            absl::StrCat(field, ": want a name other than stable and canary"));
      }
      if (!target.is_object()) {
        return absl::InvalidArgumentError(
            absl::StrCat(field, "=", tables::PreviewJson(target), ", want an object"));
      }
      KEEPSET_ASSIGN_OR_RETURN(line.aliases[alias], ParseTarget(target, field));
    }
  }
  KEEPSET_ASSIGN_OR_RETURN(const json* history,
                           Optional(document, "history", json::value_t::array, where));
  if (history != nullptr) {
    const size_t skipped = history->size() > kMaxHistory ? history->size() - kMaxHistory : 0;
    for (size_t i = skipped; i < history->size(); ++i) {
      KEEPSET_ASSIGN_OR_RETURN(
          Activation activation,
          ParseActivation((*history)[i], absl::StrCat(where, ": history[", i, "]")));
      line.history.push_back(std::move(activation));
    }
  }
  return line;
}

std::string SerializeLine(const LineAssignment& assignment) {
  json document = {{"mode", assignment.mode == LineMode::kNewest ? "newest" : "chosen"}};
  if (assignment.active.has_value()) document["stable"] = TargetJson(*assignment.active);
  if (assignment.canary.has_value()) {
    json canary = TargetJson(assignment.canary->target);
    canary["percent"] = assignment.canary->basis_points / kBasisPointsPerPercent;
    canary["salt"] = assignment.canary->salt;
    document["canary"] = std::move(canary);
  }
  json aliases = json::object();
  for (const auto& [alias, target] : assignment.aliases) aliases[alias] = TargetJson(target);
  document["aliases"] = std::move(aliases);
  json history = json::array();
  for (const Activation& activation : assignment.history) {
    json entry = TargetJson(activation.target);
    entry["time"] = absl::FormatTime(absl::RFC3339_full, activation.time, absl::UTCTimeZone());
    entry["actor"] = activation.actor;
    entry["cause"] = activation.cause;
    if (activation.undone) entry["undone"] = true;
    history.push_back(std::move(entry));
  }
  document["history"] = std::move(history);
  // An actor's name comes from outside and may hold bytes that are no UTF-8.
  return document.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace keepset::service::etcd
