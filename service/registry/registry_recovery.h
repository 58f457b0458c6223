// Between a RegistryState and the state directory: what must be kept, what is written down, and the
// state a restarted server begins with.
#ifndef KEEPSET_SERVICE_REGISTRY_REGISTRY_RECOVERY_H_
#define KEEPSET_SERVICE_REGISTRY_REGISTRY_RECOVERY_H_

#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "service/registry/registry_document.h"
#include "service/registry/registry_state.h"
#include "service/registry/state_directory.h"

namespace keepset::service {

// Uploads, whatever is active, canary or aliased, and what Rollback may go back to.
std::vector<TablePtr> TablesToKeep(const RegistryState& state);

// Lines and the tables whose files `is_kept`; revision_limit is the caller's.
RegistryDocument DocumentOf(const RegistryState& state,
                            const std::function<bool(const std::string&)>& is_kept);

// Digests `before` holds a table of and `after` does not.
std::set<std::string> UnusedDigests(const RegistryState& before, const RegistryState& after);

bool HoldsDigest(const RegistryState& state, const std::string& digest);

struct Recovered {
  // Not settled. Tables that could not be read or were refused are its failures, of source "state".
  RegistryState state;
  uint64_t revision = 0;  // larger than any given out before
  absl::Status problem;   // OK, or which tables are missing by that
  // Whole, but refused by `check`: kept on disk for a start with other keys.
  std::vector<StoredTable> withheld;
};

// An empty state when nothing was saved. Holders other than `sources` and uploads are dropped.
// Removes table files the document does not name. Errors of ReadDocument.
absl::StatusOr<Recovered> RecoverState(StateDirectory& disk, const RecoveryCheck& check,
                                       const std::vector<std::string>& sources, absl::Time now);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_REGISTRY_RECOVERY_H_
