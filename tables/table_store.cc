#include "tables/table_store.h"

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"

namespace keepset::tables {
namespace {

using TablePtr = std::shared_ptr<const DecisionTable>;

bool Asked(const std::string& want, absl::string_view have) { return want.empty() || want == have; }

bool HasIdentity(const DecisionTable& table, const TableQuery& query) {
  return Asked(query.name, table.identity().name) &&
         Asked(query.version, table.identity().version) &&
         Asked(query.digest, table.identity().digest) && Asked(query.kind, table.kind());
}

std::string Describe(const TablePtr& table) {
  return absl::StrCat(table->identity().name, "@", table->identity().version, " (", table->kind(),
                      ", ", table->identity().digest, ")");
}

std::string DescribeAll(const std::vector<TablePtr>& tables) {
  return absl::StrJoin(tables, ", ", [](std::string* out, const TablePtr& table) {
    absl::StrAppend(out, Describe(table));
  });
}

std::string DescribeQuery(const TableQuery& query) {
  std::vector<std::string> parts;
  const std::pair<absl::string_view, const std::string*> fields[] = {{"name", &query.name},
                                                                     {"version", &query.version},
                                                                     {"digest", &query.digest},
                                                                     {"alias", &query.alias},
                                                                     {"kind", &query.kind}};
  for (const auto& [field, value] : fields) {
    if (!value->empty()) {
      parts.push_back(absl::StrCat(field, "=\"", absl::CHexEscape(value->substr(0, 128)), "\""));
    }
  }
  return parts.empty() ? "any table" : absl::StrJoin(parts, ", ");
}

std::vector<TablePtr> NamedByAlias(const TableSnapshot& snapshot, const TableQuery& query) {
  if (query.alias == "stable") return snapshot.tables;
  std::vector<TablePtr> named;
  for (const auto& [name, roles] : snapshot.roles) {
    if (query.alias == "canary") {
      if (roles.canary != nullptr) named.push_back(roles.canary);
    } else if (const auto it = roles.aliases.find(query.alias); it != roles.aliases.end()) {
      named.push_back(it->second);
    }
  }
  return named;
}

// Before the model is looked at.
std::vector<TablePtr> Candidates(const TableSnapshot& snapshot, const TableQuery& query) {
  std::vector<TablePtr> all = !query.alias.empty() ? NamedByAlias(snapshot, query)
                              : query.pins()       ? snapshot.loaded
                                                   : snapshot.tables;
  std::erase_if(all, [&](const TablePtr& table) { return !HasIdentity(*table, query); });
  return all;
}

absl::Status Fits(const DecisionTable& table, const TableQuery& query) {
  return MatchFingerprint(table.model(), query.model, query.fingerprint_match, query.layer_match);
}

// The canary of the active `table`'s line when the request falls to it. A canary that does not fit
// where the active table does takes no request: its line refuses such a pair.
TablePtr CanaryFor(const TableSnapshot& snapshot, const DecisionTable& table,
                   const TableQuery& query) {
  if (query.request_id.empty()) return nullptr;
  const auto roles = snapshot.roles.find(table.identity().name);
  if (roles == snapshot.roles.end() || roles->second.canary == nullptr) return nullptr;
  const TablePtr& canary = roles->second.canary;
  if (!Asked(query.kind, canary->kind()) || !Fits(*canary, query).ok()) return nullptr;
  const bool chosen =
      CanaryBucket(roles->second.canary_salt, query.request_id) < roles->second.canary_basis_points;
  return chosen ? canary : nullptr;
}

bool IsLoose(const DecisionTable& table, const TableQuery& query) {
  return query.fingerprint_match == FingerprintMatch::kShape &&
         !ShapeRelaxations(table.model(), query.model).empty();
}

absl::Status NoSuchTable(const TableSnapshot& snapshot, const TableQuery& query) {
  const std::vector<TablePtr>& there = query.pins() ? snapshot.loaded : snapshot.tables;
  const absl::string_view state = query.pins() ? "loaded" : "active";
  return absl::NotFoundError(absl::StrCat("table ", DescribeQuery(query), ": not ", state,
                                          there.empty() ? ", no table is " : ", want one of: ",
                                          there.empty() ? state : DescribeAll(there)));
}

void SortByName(std::vector<TablePtr>& tables) {
  std::stable_sort(tables.begin(), tables.end(), [](const TablePtr& a, const TablePtr& b) {
    return a->identity().name < b->identity().name;
  });
}

}  // namespace

TableStore::TableStore() : snapshot_(std::make_shared<const TableSnapshot>()) {}

std::shared_ptr<const TableSnapshot> TableStore::Snapshot() const {
  absl::MutexLock lock(&mutex_);
  return snapshot_;
}

void TableStore::PublishSnapshot(TableSnapshot next) {
  SortByName(next.tables);
  SortByName(next.loaded);
  auto shared = std::make_shared<const TableSnapshot>(std::move(next));
  // Destroyed outside the lock: the last reference to a table may go with it.
  std::shared_ptr<const TableSnapshot> previous;
  absl::MutexLock lock(&mutex_);
  KEEPSET_CHECK(shared->revision > snapshot_->revision);
  previous = std::exchange(snapshot_, std::move(shared));
}

uint64_t TableStore::Publish(std::vector<TablePtr> tables) {
  TableSnapshot next;
  next.tables = std::move(tables);
  SortByName(next.tables);
  next.loaded = next.tables;
  auto shared = std::make_shared<TableSnapshot>(std::move(next));
  std::shared_ptr<const TableSnapshot> previous;
  absl::MutexLock lock(&mutex_);
  shared->revision = snapshot_->revision + 1;
  previous = std::exchange(snapshot_, std::move(shared));
  return snapshot_->revision;
}

absl::StatusOr<ResolvedTable> ResolveTable(const TableSnapshot& snapshot, const TableQuery& query) {
  const std::vector<TablePtr> named = Candidates(snapshot, query);
  if (named.empty()) return NoSuchTable(snapshot, query);
  std::vector<TablePtr> fitting;
  std::vector<std::string> misfits;
  for (const TablePtr& table : named) {
    const absl::Status fit = Fits(*table, query);
    if (fit.ok()) {
      fitting.push_back(table);
    } else {
      misfits.push_back(absl::StrCat(Describe(table), ": ", fit.message()));
    }
  }
  if (fitting.empty()) return absl::FailedPreconditionError(absl::StrJoin(misfits, "; "));
  if (fitting.size() > 1) {
    return absl::FailedPreconditionError(absl::StrCat(
        "table ", DescribeQuery(query), ": ", fitting.size(), query.pins() ? " loaded" : " active",
        " tables fit the model, want a name or digest out of: ", DescribeAll(fitting)));
  }
  ResolvedTable resolved;
  resolved.table = fitting.front();
  if (query.pins()) {
    resolved.selection = TableSelection::kPinned;
  } else if (TablePtr canary = CanaryFor(snapshot, *resolved.table, query); canary != nullptr) {
    resolved.table = std::move(canary);
    resolved.selection = TableSelection::kCanary;
  }
  resolved.loose_match = IsLoose(*resolved.table, query);
  return resolved;
}

absl::Status CheckTableExists(const TableSnapshot& snapshot, const TableQuery& query) {
  if (!Candidates(snapshot, query).empty()) return absl::OkStatus();
  return NoSuchTable(snapshot, query);
}

int CanaryBucket(absl::string_view salt, absl::string_view request_id) {
  uint64_t hash = 0xcbf29ce484222325u;
  const auto add = [&hash](absl::string_view bytes) {
    for (const char byte : bytes) {
      hash ^= static_cast<unsigned char>(byte);
      hash *= 0x100000001b3u;
    }
  };
  add(salt);
  add(absl::string_view("\0", 1));
  add(request_id);
  hash ^= hash >> 33;
  hash *= 0xff51afd7ed558ccdu;
  hash ^= hash >> 33;
  hash *= 0xc4ceb9fe1a85ec53u;
  hash ^= hash >> 33;
  return static_cast<int>(hash % 10000);
}

}  // namespace keepset::tables
