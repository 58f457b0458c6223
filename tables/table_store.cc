#include "tables/table_store.h"

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace keepset::tables {
namespace {

using TablePtr = std::shared_ptr<const DecisionTable>;

bool HasIdentity(const DecisionTable& table, const TableQuery& query) {
  const auto asked = [](const std::string& want, absl::string_view have) {
    return want.empty() || want == have;
  };
  return asked(query.name, table.identity().name) &&
         asked(query.version, table.identity().version) &&
         asked(query.digest, table.identity().digest) && asked(query.kind, table.kind());
}

std::string Describe(const TablePtr& table) {
  return absl::StrCat(table->identity().name, "@", table->identity().version, " (", table->kind(),
                      ", ", table->identity().digest, ")");
}

std::string DescribeAll(const std::vector<TablePtr>& tables) {
  if (tables.empty()) return "no active table";
  return absl::StrJoin(tables, ", ", [](std::string* out, const TablePtr& table) {
    absl::StrAppend(out, Describe(table));
  });
}

std::string DescribeQuery(const TableQuery& query) {
  std::vector<std::string> parts;
  const std::pair<absl::string_view, const std::string*> fields[] = {{"name", &query.name},
                                                                     {"version", &query.version},
                                                                     {"digest", &query.digest},
                                                                     {"kind", &query.kind}};
  for (const auto& [field, value] : fields) {
    if (!value->empty()) {
      parts.push_back(absl::StrCat(field, "=\"", absl::CHexEscape(value->substr(0, 128)), "\""));
    }
  }
  return parts.empty() ? "any table" : absl::StrJoin(parts, ", ");
}

}  // namespace

TableStore::TableStore() : snapshot_(std::make_shared<const TableSnapshot>()) {}

std::shared_ptr<const TableSnapshot> TableStore::Snapshot() const {
  absl::MutexLock lock(&mutex_);
  return snapshot_;
}

uint64_t TableStore::Publish(std::vector<TablePtr> tables) {
  std::stable_sort(tables.begin(), tables.end(), [](const TablePtr& a, const TablePtr& b) {
    return a->identity().name < b->identity().name;
  });
  auto next = std::make_shared<TableSnapshot>();
  next->tables = std::move(tables);
  // Destroyed outside the lock: the last reference to a table may go with it.
  std::shared_ptr<const TableSnapshot> previous;
  absl::MutexLock lock(&mutex_);
  next->revision = snapshot_->revision + 1;
  previous = std::exchange(snapshot_, std::move(next));
  return snapshot_->revision;
}

absl::StatusOr<TablePtr> ResolveTable(const TableSnapshot& snapshot, const TableQuery& query) {
  std::vector<TablePtr> named;
  for (const TablePtr& table : snapshot.tables) {
    if (HasIdentity(*table, query)) named.push_back(table);
  }
  if (named.empty()) {
    return absl::NotFoundError(
        absl::StrCat("table ", DescribeQuery(query),
                     ": not active, want one of: ", DescribeAll(snapshot.tables)));
  }
  std::vector<TablePtr> fitting;
  std::vector<std::string> misfits;
  for (const TablePtr& table : named) {
    const absl::Status fit =
        MatchFingerprint(table->model(), query.model, query.fingerprint_match, query.layer_match);
    if (fit.ok()) {
      fitting.push_back(table);
    } else {
      misfits.push_back(absl::StrCat(Describe(table), ": ", fit.message()));
    }
  }
  if (fitting.empty()) return absl::FailedPreconditionError(absl::StrJoin(misfits, "; "));
  if (fitting.size() > 1) {
    return absl::FailedPreconditionError(absl::StrCat(
        "table ", DescribeQuery(query), ": ", fitting.size(),
        " active tables fit the model, want a name or digest out of: ", DescribeAll(fitting)));
  }
  return fitting.front();
}

}  // namespace keepset::tables
