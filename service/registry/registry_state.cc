#include "service/registry/registry_state.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace keepset::service {
namespace {

constexpr size_t kMaxRetiredPerLine = 16;
constexpr size_t kMaxRetiredLines = 64;

bool IsCanaryTarget(const Line& line, const TableTarget& target) {
  return line.assignment.canary.has_value() && line.assignment.canary->target == target;
}

bool IsAliasTarget(const Line& line, const TableTarget& target) {
  return std::any_of(line.assignment.aliases.begin(), line.assignment.aliases.end(),
                     [&](const auto& alias) { return alias.second == target; });
}

// A version nobody holds any more stays while something an operator decided names it.
bool IsChosen(const Line& line, const TableTarget& target) {
  return (line.assignment.mode == LineMode::kChosen && line.assignment.active == target) ||
         IsCanaryTarget(line, target) || IsAliasTarget(line, target);
}

// Digests Rollback may go back to.
std::set<std::string> RollbackDigests(const LineAssignment& assignment) {
  std::set<std::string> digests;
  for (auto it = assignment.history.rbegin(); it != assignment.history.rend(); ++it) {
    if (digests.size() == kRollbackDepth) break;
    if (it->undone || (assignment.active && it->target == *assignment.active)) continue;
    digests.insert(it->target.digest);
  }
  return digests;
}

void Retire(Line& line, const std::string& version, std::string reason, absl::Time now) {
  const auto it = line.loaded.find(version);
  RetiredVersion retired;
  retired.target = TargetOf(*it->second.table);
  retired.table = it->second.table;
  if (!it->second.holders.empty()) retired.origin = it->second.holders.begin()->second.origin;
  retired.reason = std::move(reason);
  retired.loaded = it->second.loaded;
  retired.since = now;
  std::erase_if(line.retired, [&](const RetiredVersion& r) { return r.target == retired.target; });
  line.retired.push_back(std::move(retired));
  line.loaded.erase(it);
}

void RetireUnheld(Line& line, absl::Time now) {
  std::vector<std::string> versions;
  for (const auto& [version, loaded] : line.loaded) {
    if (loaded.holders.empty() && !IsChosen(line, TargetOf(*loaded.table))) {
      versions.push_back(version);
    }
  }
  for (const std::string& version : versions) {
    Retire(line, version, "withdrawn by its source", now);
  }
}

const tables::DecisionTable* NewestOf(const Line& line) {
  const tables::DecisionTable* newest = nullptr;
  for (const auto& [version, loaded] : line.loaded) {
    const bool eligible =
        std::any_of(loaded.holders.begin(), loaded.holders.end(),
                    [](const auto& h) { return h.second.rule == ActivationRule::kNewest; });
    if (eligible && (newest == nullptr || IsOlder(*newest, *loaded.table))) {
      newest = loaded.table.get();
    }
  }
  return newest;
}

bool MayShareRequests(const tables::DecisionTable& active, const tables::DecisionTable& canary) {
  return active.kind() == canary.kind() &&
         tables::MatchFingerprint(canary.model(), active.model(), tables::FingerprintMatch::kFull,
                                  tables::LayerMatch::kExact)
             .ok();
}

void SettleCanary(Line& line) {
  if (!line.assignment.canary.has_value() || !line.assignment.active.has_value()) return;
  const LoadedVersion* active = FindTarget(line, *line.assignment.active);
  const LoadedVersion* canary = FindTarget(line, line.assignment.canary->target);
  if (active == nullptr || canary == nullptr) return;
  if (active == canary || !MayShareRequests(*active->table, *canary->table)) {
    line.assignment.canary.reset();
  }
}

void SettleLine(Line& line, absl::Time now) {
  RetireUnheld(line, now);
  if (line.assignment.mode == LineMode::kNewest) {
    const tables::DecisionTable* newest = NewestOf(line);
    if (newest == nullptr) {
      line.assignment.active.reset();
    } else if (line.assignment.active != TargetOf(*newest)) {
      SetActive(line, TargetOf(*newest), "", "newest", now);
    }
  }
  SettleCanary(line);
  // A canary that ended may have been the only reason to stay.
  RetireUnheld(line, now);
  const std::set<std::string> wanted = RollbackDigests(line.assignment);
  for (RetiredVersion& retired : line.retired) {
    if (!wanted.contains(retired.target.digest)) retired.table = nullptr;
  }
  if (line.retired.size() > kMaxRetiredPerLine) {
    line.retired.erase(line.retired.begin(), line.retired.end() - kMaxRetiredPerLine);
  }
}

// Lines nothing is loaded for are a record, of bounded size.
void DropOldLines(RegistryState& state) {
  std::vector<std::pair<absl::Time, std::string>> empty;
  for (const auto& [name, line] : state.lines) {
    if (!line.loaded.empty() || line.assignment.mode == LineMode::kChosen) continue;
    empty.emplace_back(line.retired.empty() ? absl::InfinitePast() : line.retired.back().since,
                       name);
  }
  std::sort(empty.begin(), empty.end());
  for (size_t i = 0; i < empty.size(); ++i) {
    const bool has_record = empty[i].first != absl::InfinitePast();
    if (!has_record || i + kMaxRetiredLines < empty.size()) state.lines.erase(empty[i].second);
  }
}

// Takes over what `wish` decides, role by role; what is not loaded is left as it was.
void ApplyAssignment(Line& line, const std::string& name, LineAssignment wish,
                     absl::string_view source, absl::Time now,
                     std::vector<std::string>& unresolved) {
  const auto loaded = [&](absl::string_view role, const TableTarget& target) {
    if (FindTarget(line, target) != nullptr) return true;
    unresolved.push_back(absl::StrCat(name, ": ", role, " ", target.version, " (", target.digest,
                                      ") is not loaded"));
    return false;
  };
  line.assignment.mode = wish.mode;
  if (!wish.active.has_value()) {
    line.assignment.active.reset();
  } else if (loaded("active version", *wish.active) && line.assignment.active != wish.active) {
    if (wish.history.empty()) {
      SetActive(line, *wish.active, "", source, now);
    } else {
      SetActive(line, *wish.active, wish.history.back().actor, wish.history.back().cause, now);
    }
  }
  if (!wish.history.empty()) line.assignment.history = std::move(wish.history);
  if (!wish.canary.has_value()) {
    line.assignment.canary.reset();
  } else if (loaded("canary", wish.canary->target)) {
    line.assignment.canary = std::move(wish.canary);
  }
  std::map<std::string, TableTarget> aliases;
  for (const auto& [alias, target] : wish.aliases) {
    if (loaded(absl::StrCat("alias ", alias), target)) {
      aliases.emplace(alias, target);
    } else if (const auto it = line.assignment.aliases.find(alias);
               it != line.assignment.aliases.end()) {
      aliases.insert(*it);
    }
  }
  line.assignment.aliases = std::move(aliases);
}

// What of `version` stands in the way of a table with other content, empty if nothing.
std::string Obstacle(const Line& line, const LoadedVersion& version) {
  for (const auto& [source, holder] : version.holders) {
    return absl::StrCat("held by ", source, " (", holder.origin, ")");
  }
  if (IsChosen(line, TargetOf(*version.table))) return "chosen as active, canary or alias";
  return "";
}

TableVersionInfo InfoOf(const Line& line, const LoadedVersion& loaded) {
  const tables::DecisionTable& table = *loaded.table;
  TableVersionInfo info;
  info.name = table.identity().name;
  info.version = table.identity().version;
  info.digest = table.identity().digest;
  info.state = IsActive(line, loaded) ? VersionState::kActive : VersionState::kReady;
  for (const auto& [source, holder] : loaded.holders) {
    info.sources.push_back(source);
    if (info.origin.empty()) info.origin = holder.origin;
  }
  if (loaded.holders.empty()) info.reason = "withdrawn by its source, stays while it is chosen";
  info.loaded = loaded.loaded;
  info.state_since = loaded.since;
  info.table = loaded.table;
  return info;
}

TableVersionInfo InfoOf(const std::string& source, const SourceFailure& failure) {
  TableVersionInfo info;
  info.name = failure.name;
  info.version = failure.version;
  info.state = failure.why.ok() ? VersionState::kValidating : VersionState::kFailed;
  info.reason = std::string(failure.why.message());
  info.sources = {source};
  info.origin = failure.origin;
  info.loaded = info.state_since = failure.since;
  return info;
}

}  // namespace

absl::string_view VersionStateName(VersionState state) {
  switch (state) {
    case VersionState::kValidating:
      return "validating";
    case VersionState::kReady:
      return "ready";
    case VersionState::kActive:
      return "active";
    case VersionState::kRetired:
      return "retired";
    case VersionState::kFailed:
      return "failed";
  }
  return "unknown";
}

TableTarget TargetOf(const tables::DecisionTable& table) {
  return {table.identity().version, table.identity().digest};
}

const LoadedVersion* FindTarget(const Line& line, const TableTarget& target) {
  const auto it = line.loaded.find(target.version);
  if (it == line.loaded.end() || it->second.table->identity().digest != target.digest) {
    return nullptr;
  }
  return &it->second;
}

LoadedVersion* FindTarget(Line& line, const TableTarget& target) {
  return const_cast<LoadedVersion*>(FindTarget(static_cast<const Line&>(line), target));
}

bool IsActive(const Line& line, const LoadedVersion& version) {
  return line.assignment.active == TargetOf(*version.table);
}

bool IsNamed(const Line& line, const LoadedVersion& version) {
  const TableTarget target = TargetOf(*version.table);
  return IsCanaryTarget(line, target) || IsAliasTarget(line, target);
}

void SetActive(Line& line, const TableTarget& target, absl::string_view actor,
               absl::string_view cause, absl::Time now) {
  LineAssignment& assignment = line.assignment;
  if (assignment.active.has_value()) {
    if (LoadedVersion* before = FindTarget(line, *assignment.active)) before->since = now;
  }
  assignment.active = target;
  if (LoadedVersion* after = FindTarget(line, target)) after->since = now;
  Activation entry;
  entry.target = target;
  entry.time = now;
  entry.actor = std::string(actor);
  entry.cause = std::string(cause);
  assignment.history.push_back(std::move(entry));
  if (assignment.history.size() > kMaxHistory) {
    assignment.history.erase(assignment.history.begin());
  }
}

void ApplySourceSet(RegistryState& state, absl::string_view source, SourceSet set, absl::Time now,
                    std::vector<std::string>& unresolved) {
  const std::string key(source);
  std::set<std::string> digests;
  for (const SourceTable& entry : set.tables) digests.insert(entry.table->identity().digest);
  for (auto& [name, line] : state.lines) {
    for (auto& [version, loaded] : line.loaded) {
      if (!digests.contains(loaded.table->identity().digest)) loaded.holders.erase(key);
    }
  }
  std::set<std::pair<std::string, std::string>> delivered;
  for (SourceTable& entry : set.tables) {
    const tables::TableIdentity& identity = entry.table->identity();
    Line& line = state.lines[identity.name];
    const auto refuse = [&](const std::string& why) {
      SourceFailure failure;
      failure.origin = entry.origin;
      failure.instance = identity.digest;
      failure.why = absl::AlreadyExistsError(absl::StrCat(entry.origin, ": table ", identity.name,
                                                          "@", identity.version, " ", why,
                                                          ", want another version"));
      failure.name = identity.name;
      failure.version = identity.version;
      set.failures.push_back(std::move(failure));
    };
    const auto it = line.loaded.find(identity.version);
    if (!delivered.emplace(identity.name, identity.version).second) {
      refuse(absl::StrCat("is that of ", it->second.holders[key].origin, " already"));
      continue;
    }
    if (it != line.loaded.end() && it->second.table->identity().digest != identity.digest) {
      const std::string obstacle = Obstacle(line, it->second);
      if (!obstacle.empty()) {
        refuse(absl::StrCat("is loaded with other content (", it->second.table->identity().digest,
                            "), ", obstacle));
        delivered.erase({identity.name, identity.version});
        continue;
      }
      Retire(line, identity.version, "replaced by other content under the same version", now);
    }
    LoadedVersion& loaded = line.loaded[identity.version];
    if (loaded.table == nullptr) {
      loaded.table = entry.table;
      loaded.loaded = loaded.since = now;
      std::erase_if(line.retired,
                    [&](const RetiredVersion& r) { return r.target == TargetOf(*loaded.table); });
    }
    loaded.holders[key] = {entry.origin, set.rule};
  }
  std::map<std::pair<std::string, std::string>, SourceFailure> failures;
  for (SourceFailure& failure : set.failures) {
    const std::pair<std::string, std::string> at(key, failure.origin);
    const auto old = state.failures.find(at);
    const bool same = old != state.failures.end() && old->second.instance == failure.instance &&
                      old->second.why == failure.why;
    failure.since = same ? old->second.since : now;
    failures[at] = std::move(failure);
  }
  std::erase_if(state.failures, [&](const auto& entry) { return entry.first.first == key; });
  state.failures.merge(failures);
  for (auto& [name, wish] : set.assignments) {
    ApplyAssignment(state.lines[name], name, std::move(wish), source, now, unresolved);
  }
  if (!set.shared.has_value()) return;
  state.shared_revision = set.shared->revision;
  state.shared_source = key;
  for (const auto& [name, revision] : set.shared->lines) {
    if (const auto line = state.lines.find(name); line != state.lines.end()) {
      line->second.shared_revision = revision;
    }
  }
}

void Settle(RegistryState& state, absl::Time now) {
  for (auto& [name, line] : state.lines) SettleLine(line, now);
  DropOldLines(state);
}

std::string DescribeRef(const TableRef& ref) {
  std::vector<std::string> parts;
  const auto add = [&](absl::string_view field, absl::string_view value) {
    if (!value.empty()) parts.push_back(absl::StrCat(field, "=\"", value.substr(0, 128), "\""));
  };
  add("name", ref.name);
  add("version", ref.version);
  add("digest", ref.digest);
  add("alias", ref.alias);
  return absl::StrCat("table ", absl::StrJoin(parts, ", "));
}

absl::StatusOr<TableTarget> FindVersion(const RegistryState& state, const TableRef& ref,
                                        std::string* name) {
  if (ref.version.empty() && ref.digest.empty() && ref.alias.empty()) {
    return absl::InvalidArgumentError("table: want a version, digest or alias");
  }
  if (!ref.alias.empty() && ref.name.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("alias=\"", ref.alias, "\", want a name beside an alias"));
  }
  std::vector<std::pair<std::string, TableTarget>> found;
  std::vector<std::string> known;
  for (const auto& [line_name, line] : state.lines) {
    if (!ref.name.empty() && ref.name != line_name) continue;
    for (const auto& [version, loaded] : line.loaded) {
      const TableTarget target = TargetOf(*loaded.table);
      known.push_back(absl::StrCat(line_name, "@", version));
      if (!ref.version.empty() && ref.version != version) continue;
      if (!ref.digest.empty() && ref.digest != target.digest) continue;
      if (!ref.alias.empty()) {
        const auto alias = line.assignment.aliases.find(ref.alias);
        const bool named = (ref.alias == kStableAlias && line.assignment.active == target) ||
                           (ref.alias == kCanaryAlias && IsCanaryTarget(line, target)) ||
                           (alias != line.assignment.aliases.end() && alias->second == target);
        if (!named) continue;
      }
      found.emplace_back(line_name, target);
    }
  }
  if (found.empty()) {
    return absl::NotFoundError(
        absl::StrCat(DescribeRef(ref), ": not loaded, want one of: ",
                     known.empty() ? "(nothing is loaded)" : absl::StrJoin(known, ", ")));
  }
  if (found.size() > 1) {
    return absl::FailedPreconditionError(absl::StrCat(
        DescribeRef(ref), ": ", found.size(), " loaded versions match, want a name or digest"));
  }
  if (name != nullptr) *name = found[0].first;
  return found[0].second;
}

std::shared_ptr<LineView> ViewOf(const RegistryState& state, const std::string& name,
                                 const std::function<bool(const std::string&)>& is_durable) {
  const Line& line = state.lines.at(name);
  auto view = std::make_shared<LineView>();
  view->name = name;
  view->assignment = line.assignment;
  // Chosen, but not there (its file was damaged, or is not signed): nothing is active.
  if (view->assignment.active && FindTarget(line, *view->assignment.active) == nullptr) {
    view->assignment.active.reset();
  }
  for (const auto& [version, loaded] : line.loaded) {
    view->versions.push_back(InfoOf(line, loaded));
    view->versions.back().durable = is_durable(loaded.table->identity().digest);
  }
  for (const auto& [at, failure] : state.failures) {
    if (failure.name == name) view->versions.push_back(InfoOf(at.first, failure));
  }
  for (const RetiredVersion& retired : line.retired) {
    TableVersionInfo info;
    info.name = name;
    info.version = retired.target.version;
    info.digest = retired.target.digest;
    info.state = VersionState::kRetired;
    info.reason = retired.reason;
    info.origin = retired.origin;
    info.loaded = retired.loaded;
    info.state_since = retired.since;
    info.table = retired.table;
    view->versions.push_back(std::move(info));
  }
  return view;
}

std::vector<TableVersionInfo> NamelessOf(const RegistryState& state) {
  std::vector<TableVersionInfo> nameless;
  for (const auto& [at, failure] : state.failures) {
    if (!state.lines.contains(failure.name)) nameless.push_back(InfoOf(at.first, failure));
  }
  return nameless;
}

tables::TableSnapshot SnapshotOf(const RegistryState& state) {
  tables::TableSnapshot snapshot;
  for (const auto& [name, line] : state.lines) {
    for (const auto& [version, loaded] : line.loaded) {
      snapshot.loaded.push_back(loaded.table);
      if (IsActive(line, loaded)) snapshot.tables.push_back(loaded.table);
    }
    tables::TableRoles roles;
    if (line.assignment.canary.has_value()) {
      if (const LoadedVersion* canary = FindTarget(line, line.assignment.canary->target)) {
        roles.canary = canary->table;
        roles.canary_basis_points = line.assignment.canary->basis_points;
        roles.canary_salt = line.assignment.canary->salt;
      }
    }
    for (const auto& [alias, target] : line.assignment.aliases) {
      if (const LoadedVersion* named = FindTarget(line, target))
        roles.aliases[alias] = named->table;
    }
    if (roles.canary != nullptr || !roles.aliases.empty()) snapshot.roles[name] = std::move(roles);
  }
  return snapshot;
}

}  // namespace keepset::service
