#include "service/registry/registry_changes.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"

namespace keepset::service {
namespace {

constexpr size_t kMaxAliases = 64;
constexpr size_t kMaxAliasBytes = 128;
constexpr size_t kMaxSaltBytes = 256;
constexpr int kAllBasisPoints = 10000;

absl::StatusOr<Line*> FindLine(RegistryState& state, absl::string_view name) {
  const auto it = state.lines.find(std::string(name));
  if (it != state.lines.end()) return &it->second;
  std::vector<std::string> names;
  for (const auto& [known, line] : state.lines) names.push_back(known);
  return absl::NotFoundError(absl::StrCat(
      "name=\"", absl::CHexEscape(name.substr(0, 128)), "\": no such table, want one of: ",
      names.empty() ? "(nothing is loaded)" : absl::StrJoin(names, ", ")));
}

absl::Status CheckAlias(absl::string_view alias) {
  const bool known = std::all_of(alias.begin(), alias.end(), [](char c) {
    return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
  });
  if (alias.empty() || alias.size() > kMaxAliasBytes || !known) {
    return absl::InvalidArgumentError(
        absl::StrCat("alias=\"", absl::CHexEscape(alias.substr(0, kMaxAliasBytes)), "\", want 1..",
                     kMaxAliasBytes, " characters of A-Z a-z 0-9 . _ -"));
  }
  if (alias == kStableAlias || alias == kCanaryAlias) {
    return absl::InvalidArgumentError(absl::StrCat("alias=\"", alias, "\" follows from ",
                                                   alias == kStableAlias ? "Activate" : "SetCanary",
                                                   ", want another name"));
  }
  return absl::OkStatus();
}

std::string Describe(absl::string_view name, const TableTarget& target) {
  return absl::StrCat("table ", name, "@", target.version);
}

// A canary that the new active version could not share requests with must be ended by whoever set
// it.
absl::Status CheckShares(const std::string& name, const Line& line, const TableTarget& active,
                         const TableTarget& canary) {
  const LoadedVersion* a = FindTarget(line, active);
  const LoadedVersion* c = FindTarget(line, canary);
  if (a == nullptr || c == nullptr || a == c) return absl::OkStatus();
  if (a->table->kind() != c->table->kind()) {
    return absl::FailedPreconditionError(
        absl::StrCat(Describe(name, canary), ": kind=", c->table->kind(), ", want ",
                     a->table->kind(), " as ", active.version, ", whose requests it would share"));
  }
  absl::Status fit =
      tables::MatchFingerprint(c->table->model(), a->table->model(),
                               tables::FingerprintMatch::kFull, tables::LayerMatch::kExact);
  if (fit.ok()) return fit;
  return absl::FailedPreconditionError(absl::StrCat(Describe(name, canary), ": ", fit.message(),
                                                    "; canary and active version ", active.version,
                                                    " must be of one model"));
}

absl::Status CheckActivation(const std::string& name, const Line& line, const TableTarget& target) {
  if (!line.assignment.canary.has_value()) return absl::OkStatus();
  return CheckShares(name, line, target, line.assignment.canary->target);
}

// Back into the loaded versions, without a holder.
absl::Status Revive(Line& line, const std::string& name, const TableTarget& target,
                    absl::Time now) {
  if (FindTarget(line, target) != nullptr) return absl::OkStatus();
  const auto it = std::find_if(line.retired.begin(), line.retired.end(), [&](const auto& retired) {
    return retired.target == target && retired.table != nullptr;
  });
  const bool taken = line.loaded.contains(target.version);
  if (it == line.retired.end() || taken) {
    return absl::FailedPreconditionError(absl::StrCat(
        Describe(name, target), " (", target.digest, "), the previous active version, ",
        taken ? "is loaded with other content now" : "is not loaded any more",
        ", want Activate of a loaded version"));
  }
  LoadedVersion loaded;
  loaded.table = it->table;
  loaded.loaded = it->loaded;
  loaded.since = now;
  line.loaded.emplace(target.version, std::move(loaded));
  line.retired.erase(it);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::string> ChangeActive(RegistryState& state, const TableRef& table,
                                         absl::string_view set_alias, absl::string_view actor,
                                         absl::Time now) {
  if (!set_alias.empty()) KEEPSET_RETURN_IF_ERROR(CheckAlias(set_alias));
  std::string name;
  KEEPSET_ASSIGN_OR_RETURN(const TableTarget target, FindVersion(state, table, &name));
  Line& line = state.lines[name];
  KEEPSET_RETURN_IF_ERROR(CheckActivation(name, line, target));
  line.assignment.mode = LineMode::kChosen;
  if (line.assignment.active != target) SetActive(line, target, actor, "activate", now);
  if (!set_alias.empty()) line.assignment.aliases[std::string(set_alias)] = target;
  return name;
}

absl::StatusOr<std::string> ChangeToNewest(RegistryState& state, absl::string_view name) {
  KEEPSET_ASSIGN_OR_RETURN(Line* const line, FindLine(state, name));
  const bool watched = std::any_of(line->loaded.begin(), line->loaded.end(), [](const auto& entry) {
    const auto& holders = entry.second.holders;
    return std::any_of(holders.begin(), holders.end(), [](const auto& holder) {
      return holder.second.rule == ActivationRule::kNewest;
    });
  });
  if (!watched) {
    return absl::FailedPreconditionError(
        absl::StrCat("name=\"", name, "\": no watched directory holds a version of it"));
  }
  line->assignment.mode = LineMode::kNewest;
  return std::string(name);
}

absl::StatusOr<std::string> RollBack(RegistryState& state, absl::string_view name,
                                     absl::string_view actor, absl::Time now) {
  KEEPSET_ASSIGN_OR_RETURN(Line* const line, FindLine(state, name));
  std::vector<Activation>& history = line->assignment.history;
  const auto previous = std::find_if(history.rbegin(), history.rend(), [&](const Activation& a) {
    return !a.undone && line->assignment.active != a.target;
  });
  if (previous == history.rend()) {
    return absl::FailedPreconditionError(
        absl::StrCat("table ", name, ": has no previous active version to go back to"));
  }
  const TableTarget target = previous->target;
  const std::string line_name(name);
  KEEPSET_RETURN_IF_ERROR(Revive(*line, line_name, target, now));
  KEEPSET_RETURN_IF_ERROR(CheckActivation(line_name, *line, target));
  for (auto it = history.rbegin(); it != previous; ++it) it->undone = true;
  line->assignment.mode = LineMode::kChosen;
  SetActive(*line, target, actor, "rollback", now);
  return line_name;
}

absl::StatusOr<std::string> ChangeCanary(RegistryState& state, const TableRef& table,
                                         int basis_points, absl::string_view salt) {
  if (basis_points < 0 || basis_points > kAllBasisPoints) {
    return absl::InvalidArgumentError(
        absl::StrCat("percent=", basis_points / 100.0, ", want 0..100"));
  }
  if (basis_points == 0) {
    KEEPSET_ASSIGN_OR_RETURN(Line* const line, FindLine(state, table.name));
    line->assignment.canary.reset();
    return table.name;
  }
  if (salt.size() > kMaxSaltBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("salt: ", salt.size(), " bytes, want at most ", kMaxSaltBytes));
  }
  std::string name;
  KEEPSET_ASSIGN_OR_RETURN(const TableTarget target, FindVersion(state, table, &name));
  Line& line = state.lines[name];
  if (!line.assignment.active.has_value() || FindTarget(line, *line.assignment.active) == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("table ", name, ": has no active version, want one before a canary"));
  }
  if (line.assignment.active == target) {
    return absl::FailedPreconditionError(
        absl::StrCat(Describe(name, target), " is active, want another version as canary"));
  }
  KEEPSET_RETURN_IF_ERROR(CheckShares(name, line, *line.assignment.active, target));
  Canary canary;
  canary.target = target;
  canary.basis_points = basis_points;
  canary.salt = salt.empty() ? target.digest : std::string(salt);
  line.assignment.canary = std::move(canary);
  return name;
}

absl::StatusOr<std::string> ChangeAlias(RegistryState& state, absl::string_view name,
                                        absl::string_view alias, const TableRef& table) {
  KEEPSET_RETURN_IF_ERROR(CheckAlias(alias));
  KEEPSET_ASSIGN_OR_RETURN(Line* const line, FindLine(state, name));
  std::map<std::string, TableTarget>& aliases = line->assignment.aliases;
  const std::string key(alias);
  if (table.version.empty() && table.digest.empty() && table.alias.empty()) {
    if (aliases.erase(key) == 0) {
      return absl::NotFoundError(absl::StrCat("table ", name, ": has no alias \"", alias, "\""));
    }
    return std::string(name);
  }
  if (!table.name.empty() && table.name != name) {
    return absl::InvalidArgumentError(absl::StrCat("table.name=\"", table.name.substr(0, 128),
                                                   "\", want \"", name, "\" or none"));
  }
  TableRef of_line = table;
  of_line.name = std::string(name);
  KEEPSET_ASSIGN_OR_RETURN(const TableTarget target, FindVersion(state, of_line, nullptr));
  if (!aliases.contains(key) && aliases.size() >= kMaxAliases) {
    return absl::ResourceExhaustedError(
        absl::StrCat("table ", name, ": has ", aliases.size(), " aliases, want one removed first"));
  }
  aliases[key] = target;
  return of_line.name;
}

absl::StatusOr<std::string> DropUpload(RegistryState& state, const TableRef& table) {
  std::string name;
  KEEPSET_ASSIGN_OR_RETURN(const TableTarget target, FindVersion(state, table, &name));
  Line& line = state.lines[name];
  LoadedVersion* const loaded = FindTarget(line, target);
  const auto in_use = [&](absl::string_view as) {
    return absl::FailedPreconditionError(
        absl::StrCat(Describe(name, target), " is ", as, ", want that changed before Unload"));
  };
  if (IsActive(line, *loaded)) return in_use("active");
  if (line.assignment.canary.has_value() && line.assignment.canary->target == target) {
    return in_use("the canary");
  }
  for (const auto& [alias, named] : line.assignment.aliases) {
    if (named == target) return in_use(absl::StrCat("alias \"", alias, "\""));
  }
  for (const auto& [source, holder] : loaded->holders) {
    if (source == kUploadSource) continue;
    return absl::FailedPreconditionError(absl::StrCat(Describe(name, target), " is held by ",
                                                      source, " (", holder.origin,
                                                      "), want it removed there"));
  }
  loaded->holders.erase(std::string(kUploadSource));
  // Unloaded on purpose: Rollback must not bring it back.
  for (Activation& entry : line.assignment.history) {
    if (entry.target == target) entry.undone = true;
  }
  return name;
}

absl::Status AddUpload(RegistryState& state, const SourceTable& table, absl::Time now) {
  const tables::TableIdentity& identity = table.table->identity();
  Line& line = state.lines[identity.name];
  const auto it = line.loaded.find(identity.version);
  if (it != line.loaded.end() && it->second.table->identity().digest != identity.digest) {
    return absl::AlreadyExistsError(
        absl::StrCat(table.origin, ": table ", identity.name, "@", identity.version,
                     " is loaded with other content (", it->second.table->identity().digest,
                     "), want another version"));
  }
  LoadedVersion& loaded = line.loaded[identity.version];
  if (loaded.table == nullptr) {
    loaded.table = table.table;
    loaded.loaded = loaded.since = now;
    std::erase_if(line.retired, [&](const RetiredVersion& retired) {
      return retired.target == TargetOf(*table.table);
    });
  }
  loaded.holders[std::string(kUploadSource)] = {table.origin, ActivationRule::kOnRequest};
  return absl::OkStatus();
}

}  // namespace keepset::service
