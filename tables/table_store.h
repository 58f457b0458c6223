// The set of active tables as atomic snapshots: readers take one pointer, a publisher swaps it.
//
// Thread-safe. A snapshot is immutable; an operation keeps the one it began with, so all its layers
// see the same table and an old table goes when its last operation ends.
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

struct TableSnapshot {
  uint64_t revision = 0;  // grows with every publish
  // Active tables, ordered by name then file; one per name.
  std::vector<std::shared_ptr<const DecisionTable>> tables;
};

// How a request picks its table. Empty fields do not constrain.
struct TableQuery {
  std::string name;
  std::string version;
  std::string digest;  // a pin: exact or nothing
  std::string kind;    // what the policy asks for
  ModelFingerprint model;
  FingerprintMatch fingerprint_match = FingerprintMatch::kFull;
  LayerMatch layer_match = LayerMatch::kExact;
};

class TableStore {
 public:
  TableStore();

  std::shared_ptr<const TableSnapshot> Snapshot() const;

  // Replaces the whole set in one swap; returns the new revision.
  uint64_t Publish(std::vector<std::shared_ptr<const DecisionTable>> tables);

 private:
  mutable absl::Mutex mutex_;
  std::shared_ptr<const TableSnapshot> snapshot_ ABSL_GUARDED_BY(mutex_);
};

// The one table of `snapshot` that answers `query`. NotFound when no table has the asked name,
// version, digest or kind (the message lists what there is); FailedPrecondition when one has but
// does not fit the model, naming the field; FailedPrecondition when several fit and the query names
// none.
absl::StatusOr<std::shared_ptr<const DecisionTable>> ResolveTable(const TableSnapshot& snapshot,
                                                                  const TableQuery& query);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_TABLE_STORE_H_
