// The tables operations may use as atomic snapshots: readers take one pointer, a publisher swaps
// it.
//
// Thread-safe. A snapshot is immutable; an operation keeps the one it began with, so all its layers
// see the same table and an old table goes when its last operation ends. Everything that decides
// which table answers (active versions, canaries, aliases) is in the snapshot.
#ifndef KEEPSET_TABLES_TABLE_STORE_H_
#define KEEPSET_TABLES_TABLE_STORE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "tables/decision_table.h"

namespace keepset::tables {

// What one table name has beside its active version.
struct TableRoles {
  // Gets `canary_basis_points` / 10000 of the requests that pin nothing; nullptr: none.
  std::shared_ptr<const DecisionTable> canary;
  int canary_basis_points = 0;
  std::string canary_salt;
  // Does not hold "stable" and "canary", which follow from the above.
  std::map<std::string, std::shared_ptr<const DecisionTable>> aliases;
};

struct TableSnapshot {
  uint64_t revision = 0;  // grows with every publish
  // Active tables, ordered by name; one per name.
  std::vector<std::shared_ptr<const DecisionTable>> tables;
  // Every table a request may pin, active ones included; ordered by name.
  std::vector<std::shared_ptr<const DecisionTable>> loaded;
  std::map<std::string, TableRoles> roles;  // by table name; names without any are absent
};

// How a request picks its table. Empty fields do not constrain. Version, digest or alias pin the
// table; otherwise it is the active version, or the canary for a share of the requests.
struct TableQuery {
  std::string name;
  std::string version;
  std::string digest;
  std::string alias;  // "stable", "canary" or one of TableRoles::aliases
  std::string kind;   // what the policy asks for
  ModelFingerprint model;
  FingerprintMatch fingerprint_match = FingerprintMatch::kFull;
  LayerMatch layer_match = LayerMatch::kExact;
  // Decides the side of a canary; empty: never the canary's.
  std::string request_id;

  bool pins() const { return !version.empty() || !digest.empty() || !alias.empty(); }
};

enum class TableSelection { kActive, kCanary, kPinned };

struct ResolvedTable {
  std::shared_ptr<const DecisionTable> table;
  TableSelection selection = TableSelection::kActive;
  // It fits only because the query asked for FingerprintMatch::kShape.
  bool loose_match = false;
};

class TableStore {
 public:
  TableStore();

  std::shared_ptr<const TableSnapshot> Snapshot() const;

  // Replaces everything in one swap. The revision must be larger than that of the snapshot now.
  void PublishSnapshot(TableSnapshot next);
  // A set without roles, everything active, with the next revision; returns it.
  uint64_t Publish(std::vector<std::shared_ptr<const DecisionTable>> tables);

 private:
  mutable absl::Mutex mutex_;
  std::shared_ptr<const TableSnapshot> snapshot_ ABSL_GUARDED_BY(mutex_);
};

// The one table of `snapshot` that answers `query`. NotFound when no table has the asked name,
// version, digest, alias or kind (the message lists what there is); FailedPrecondition when one has
// but does not fit the model, naming the field; FailedPrecondition when several fit and the query
// names none.
absl::StatusOr<ResolvedTable> ResolveTable(const TableSnapshot& snapshot, const TableQuery& query);

// Whether any table has what `query` names, whatever its model: OK, or NotFound as ResolveTable.
absl::Status CheckTableExists(const TableSnapshot& snapshot, const TableQuery& query);

// 0..9999, uniform over request ids and independent between salts; the canary's side are the
// buckets below its basis points. The same on every server and in every version: the 64-bit FNV-1a
// hash of salt, a zero byte and request_id, finished by MurmurHash3's fmix64, modulo 10000.
int CanaryBucket(absl::string_view salt, absl::string_view request_id);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_TABLE_STORE_H_
