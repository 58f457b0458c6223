#include "clients/cli/registry_text.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"
#include "clients/cli/exit_status.h"

namespace keepset::cli {
namespace {

using Json = nlohmann::ordered_json;
using Row = std::vector<std::string>;

// "sha256:" and the first digits, enough to tell versions apart.
constexpr size_t kShownDigest = 7 + 12;

std::string UtcText(absl::Time time) {
  if (time == absl::InfinitePast()) return "";
  return absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", time, absl::UTCTimeZone());
}

std::string Percent(double percent) { return absl::StrFormat("%g%%", percent); }

// What `version` is to unpinned requests and to aliases.
std::string Role(const client::TableLine& line, const client::TableVersion& version) {
  std::vector<std::string> roles;
  if (version.state == client::TableState::kActive) {
    roles.emplace_back(line.follows_newest ? "stable (newest)" : "stable");
  }
  if (line.canary.has_value() && line.canary->digest == version.digest) {
    roles.push_back(absl::StrCat("canary ", Percent(line.canary->percent)));
  }
  for (const client::TableAlias& alias : line.aliases) {
    if (alias.digest == version.digest) roles.push_back(alias.alias);
  }
  return absl::StrJoin(roles, ", ");
}

std::string Align(const std::vector<Row>& rows) {
  std::vector<size_t> widths;
  for (const Row& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string out;
  for (const Row& row : rows) {
    std::string text;
    for (size_t i = 0; i < row.size(); ++i) {
      absl::StrAppendFormat(&text, "%-*s  ", static_cast<int>(widths[i]), row[i]);
    }
    absl::StrAppend(&out, absl::StripTrailingAsciiWhitespace(text), "\n");
  }
  return out;
}

std::string Refusal(const client::TableVersion& version) {
  const std::string name =
      version.name.empty() ? "" : absl::StrCat(version.name, "@", version.version, ", ");
  return absl::StrCat(client::TableStateName(version.state), "  ", name, version.origin,
                      version.reason.empty() ? "" : ": ", version.reason, "\n");
}

Json ModelJson(const client::ModelFingerprint& model) {
  Json out = {{"architecture", model.architecture}, {"num_layers", model.num_layers},
              {"num_qo_heads", model.num_qo_heads}, {"num_kv_heads", model.num_kv_heads},
              {"head_dim", model.head_dim},         {"revision", model.revision}};
  out["rope"] = Json::parse(model.rope_json, nullptr, /*allow_exceptions=*/false);
  if (out["rope"].is_discarded()) out["rope"] = nullptr;
  return out;
}

Json SourcesJson(const std::vector<client::TableSource>& sources) {
  Json out = Json::array();
  for (const client::TableSource& source : sources) {
    out.push_back({{"source", source.source},
                   {"healthy", source.healthy},
                   {"detail", source.detail},
                   {"since", UtcText(source.since)}});
  }
  return out;
}

Json LinesJson(const std::vector<client::TableLine>& lines) {
  Json out = Json::array();
  for (const client::TableLine& line : lines) out.push_back(LineJson(line));
  return out;
}

}  // namespace

absl::StatusOr<client::TableRef> ParseTableRef(absl::string_view text) {
  client::TableRef ref;
  const size_t at = text.find_first_of("@:");
  ref.name = std::string(text.substr(0, at));
  if (at != absl::string_view::npos) {
    const std::string rest(text.substr(at + 1));
    if (text[at] == ':') {
      ref.alias = rest;
    } else if (absl::StartsWith(rest, "sha256:")) {
      ref.digest = rest;
    } else {
      ref.version = rest;
    }
    if (rest.empty()) ref.name.clear();
  }
  if (ref.name.empty()) {
    return UsageError(absl::StrCat("table \"", text,
                                   "\", want NAME, NAME@VERSION, NAME@sha256:HEX or NAME:ALIAS"));
  }
  return ref;
}

std::string RegistryText(const client::TableList& list) {
  std::vector<Row> rows = {
      {"NAME", "VERSION", "STATE", "ROLE", "KIND", "PROVENANCE", "DIGEST", "SOURCES", "SINCE"}};
  std::string refusals;
  for (const client::TableLine& line : list.lines) {
    for (const client::TableVersion& version : line.versions) {
      if (version.state == client::TableState::kFailed) {
        absl::StrAppend(&refusals, Refusal(version));
        continue;
      }
      rows.push_back({line.name, version.version,
                      std::string(client::TableStateName(version.state)), Role(line, version),
                      version.kind, version.provenance, version.digest.substr(0, kShownDigest),
                      absl::StrJoin(version.sources, ","), UtcText(version.state_since)});
    }
  }
  std::string out = rows.size() == 1 ? "no tables\n" : Align(rows);
  for (const client::TableVersion& version : list.nameless) {
    absl::StrAppend(&refusals, Refusal(version));
  }
  absl::StrAppend(&out, refusals);
  for (const client::TableSource& source : list.sources) {
    if (source.healthy) continue;
    absl::StrAppend(&out, "source  ", source.source, " since ", UtcText(source.since), ": ",
                    source.detail, "\n");
  }
  absl::StrAppend(&out, "revision ", list.revision, ", authority ", list.authority, ", ",
                  list.writable ? "writable" : "read-only", "\n");
  return out;
}

std::string LineText(const client::TableLine& line) {
  std::string out =
      absl::StrCat(line.name, "  revision ", line.revision, "  active ",
                   line.active_version.empty() ? "none" : line.active_version.c_str());
  if (line.canary.has_value()) {
    absl::StrAppend(&out, "  canary ", line.canary->version, " ", Percent(line.canary->percent));
  }
  for (const client::TableAlias& alias : line.aliases) {
    absl::StrAppend(&out, "  ", alias.alias, " ", alias.version);
  }
  return out;
}

std::string JsonText(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Json VersionJson(const client::TableVersion& version) {
  return {{"name", version.name},
          {"version", version.version},
          {"digest", version.digest},
          {"state", std::string(client::TableStateName(version.state))},
          {"reason", version.reason},
          {"kind", version.kind},
          {"provenance", version.provenance},
          {"created", UtcText(version.created)},
          {"model", ModelJson(version.model)},
          {"sources", version.sources},
          {"origin", version.origin},
          {"loaded", UtcText(version.loaded)},
          {"state_since", UtcText(version.state_since)},
          {"durable", version.durable},
          {"bytes", version.bytes}};
}

Json LineJson(const client::TableLine& line) {
  Json canary = nullptr;
  if (line.canary.has_value()) {
    canary = {{"version", line.canary->version},
              {"digest", line.canary->digest},
              {"percent", line.canary->percent},
              {"salt", line.canary->salt}};
  }
  Json aliases = Json::object();
  for (const client::TableAlias& alias : line.aliases) {
    aliases[alias.alias] = {{"version", alias.version}, {"digest", alias.digest}};
  }
  Json history = Json::array();
  for (const client::TableActivation& activation : line.history) {
    history.push_back({{"version", activation.version},
                       {"digest", activation.digest},
                       {"time", UtcText(activation.time)},
                       {"actor", activation.actor},
                       {"cause", activation.cause},
                       {"undone", activation.undone}});
  }
  Json versions = Json::array();
  for (const client::TableVersion& version : line.versions) {
    versions.push_back(VersionJson(version));
  }
  return {{"name", line.name},
          {"revision", line.revision},
          {"follows_newest", line.follows_newest},
          {"active_version", line.active_version},
          {"active_digest", line.active_digest},
          {"canary", canary},
          {"aliases", aliases},
          {"history", history},
          {"versions", versions}};
}

Json RegistryJson(const client::TableList& list) {
  Json nameless = Json::array();
  for (const client::TableVersion& version : list.nameless) {
    nameless.push_back(VersionJson(version));
  }
  return {{"revision", list.revision},       {"authority", list.authority},
          {"writable", list.writable},       {"lines", LinesJson(list.lines)},
          {"nameless", std::move(nameless)}, {"sources", SourcesJson(list.sources)}};
}

Json ChangeJson(const client::TableChange& change) {
  return {{"revision", change.revision},
          {"complete", change.complete},
          {"lines", LinesJson(change.lines)},
          {"removed", change.removed},
          {"sources", SourcesJson(change.sources)}};
}

}  // namespace keepset::cli
