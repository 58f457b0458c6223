#include "service/registry/registry_recovery.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "service/registry/registry_changes.h"

namespace keepset::service {
namespace {

bool MustStay(const Line& line, const LoadedVersion& loaded) {
  return loaded.holders.contains(std::string(kUploadSource)) || IsActive(line, loaded) ||
         IsNamed(line, loaded);
}

std::set<std::string> DigestsOf(const RegistryState& state) {
  std::set<std::string> digests;
  for (const auto& [name, line] : state.lines) {
    for (const auto& [version, loaded] : line.loaded) {
      digests.insert(loaded.table->identity().digest);
    }
    for (const RetiredVersion& retired : line.retired) {
      if (retired.table != nullptr) digests.insert(retired.target.digest);
    }
  }
  return digests;
}

void Restore(const StoredTable& stored, TablePtr table, const std::vector<std::string>& sources,
             absl::Time now, Line& line) {
  if (stored.retired) {
    RetiredVersion retired;
    retired.target = stored.target;
    retired.table = std::move(table);
    retired.reason = "retired before this server started";
    retired.loaded = stored.loaded;
    retired.since = now;
    line.retired.push_back(std::move(retired));
    return;
  }
  LoadedVersion& loaded = line.loaded[stored.target.version];
  loaded.table = std::move(table);
  loaded.loaded = stored.loaded;
  loaded.since = now;
  for (const auto& [source, holder] : stored.holders) {
    if (source == kUploadSource || std::count(sources.begin(), sources.end(), source) > 0) {
      loaded.holders[source] = holder;
    }
  }
}

absl::StatusOr<TablePtr> ReadStored(const StateDirectory& disk, const StoredTable& stored) {
  KEEPSET_ASSIGN_OR_RETURN(TablePtr table, disk.Map(stored.target.digest));
  const tables::TableIdentity& identity = table->identity();
  if (identity.name == stored.name && identity.version == stored.target.version) return table;
  return absl::DataLossError(absl::StrCat(stored.target.digest, ": is table ", identity.name, "@",
                                          identity.version, ", want ", stored.name, "@",
                                          stored.target.version));
}

void Fail(const StoredTable& stored, const absl::Status& why, absl::Time now,
          RegistryState& state) {
  SourceFailure failure;
  failure.origin = failure.instance = stored.target.digest;
  failure.why = why;
  failure.name = stored.name;
  failure.version = stored.target.version;
  failure.since = now;
  state.failures[{std::string(kStateSource), failure.origin}] = std::move(failure);
}

}  // namespace

std::vector<TablePtr> TablesToKeep(const RegistryState& state) {
  std::vector<TablePtr> tables;
  for (const auto& [name, line] : state.lines) {
    for (const auto& [version, loaded] : line.loaded) {
      if (MustStay(line, loaded)) tables.push_back(loaded.table);
    }
    for (const RetiredVersion& retired : line.retired) {
      if (retired.table != nullptr) tables.push_back(retired.table);
    }
  }
  return tables;
}

RegistryDocument DocumentOf(const RegistryState& state,
                            const std::function<bool(const std::string&)>& is_kept) {
  RegistryDocument document;
  if (state.shared_revision.has_value()) {
    document.shared = SharedRevisions{state.shared_source, *state.shared_revision, {}};
  }
  for (const auto& [name, line] : state.lines) {
    document.lines[name] = line.assignment;
    if (document.shared.has_value() && line.shared_revision.has_value()) {
      document.shared->lines[name] = *line.shared_revision;
    }
    for (const auto& [version, loaded] : line.loaded) {
      const TableTarget target = TargetOf(*loaded.table);
      if (!is_kept(target.digest)) continue;
      document.tables.push_back({name, target, loaded.holders, false, loaded.loaded});
    }
    for (const RetiredVersion& retired : line.retired) {
      if (retired.table == nullptr || !is_kept(retired.target.digest)) continue;
      document.tables.push_back({name, retired.target, {}, true, retired.loaded});
    }
  }
  return document;
}

std::set<std::string> UnusedDigests(const RegistryState& before, const RegistryState& after) {
  std::set<std::string> unused = DigestsOf(before);
  for (const std::string& digest : DigestsOf(after)) unused.erase(digest);
  return unused;
}

bool HoldsDigest(const RegistryState& state, const std::string& digest) {
  return DigestsOf(state).contains(digest);
}

absl::StatusOr<Recovered> RecoverState(StateDirectory& disk, const RecoveryCheck& check,
                                       const std::vector<std::string>& sources, absl::Time now) {
  Recovered recovered;
  const absl::StatusOr<RegistryDocument> document = disk.ReadDocument();
  if (absl::IsNotFound(document.status())) return recovered;
  if (!document.ok()) return document.status();
  recovered.revision = document->revision_limit;
  for (const auto& [name, assignment] : document->lines) {
    recovered.state.lines[name].assignment = assignment;
  }
  if (document->shared.has_value() &&
      std::count(sources.begin(), sources.end(), document->shared->source) > 0) {
    recovered.state.shared_source = document->shared->source;
    recovered.state.shared_revision = document->shared->revision;
    for (const auto& [name, revision] : document->shared->lines) {
      if (const auto line = recovered.state.lines.find(name); line != recovered.state.lines.end()) {
        line->second.shared_revision = revision;
      }
    }
  }
  std::set<std::string> digests;
  std::vector<std::string> problems;
  for (const StoredTable& stored : document->tables) {
    absl::StatusOr<TablePtr> table = ReadStored(disk, stored);
    const absl::Status allowed =
        table.ok() && check != nullptr
            ? check((*table)->file_bytes(), disk.Signature(stored.target.digest),
                    stored.target.digest)
            : absl::OkStatus();
    if (!table.ok() || !allowed.ok()) {
      const absl::Status& why = table.ok() ? allowed : table.status();
      problems.emplace_back(why.message());
      Fail(stored, why, now, recovered.state);
      if (!table.ok()) continue;
      recovered.withheld.push_back(stored);
    } else {
      Restore(stored, *std::move(table), sources, now, recovered.state.lines[stored.name]);
    }
    digests.insert(stored.target.digest);
  }
  disk.RemoveOthers(digests);
  if (!problems.empty()) {
    recovered.problem = absl::DataLossError(
        absl::StrCat(problems.size(), " of ", document->tables.size(),
                     " saved tables cannot be served: ", absl::StrJoin(problems, "; ")));
  }
  return recovered;
}

}  // namespace keepset::service
