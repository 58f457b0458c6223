// registry.json: what of the registry survives a restart, as one JSON document.
#ifndef KEEPSET_SERVICE_REGISTRY_REGISTRY_DOCUMENT_H_
#define KEEPSET_SERVICE_REGISTRY_REGISTRY_DOCUMENT_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "service/registry/registry_state.h"
#include "service/registry/registry_types.h"

namespace keepset::service {

// A table whose file lies in the state directory.
struct StoredTable {
  std::string name;
  TableTarget target;
  std::map<std::string, Holder> holders;  // by source; empty: only chosen, or retired
  bool retired = false;                   // kept for Rollback
  absl::Time loaded;

  bool operator==(const StoredTable&) const = default;
};

struct RegistryDocument {
  // No revision up to this one may be given out again.
  uint64_t revision_limit = 0;
  std::map<std::string, LineAssignment> lines;
  std::vector<StoredTable> tables;
  std::optional<SharedRevisions> shared;  // of what a fleet's source said last

  bool operator==(const RegistryDocument&) const = default;
};

std::string SerializeRegistryDocument(const RegistryDocument& document);

// Strict: InvalidArgument for whatever SerializeRegistryDocument would not have written, beginning
// with `where`; FailedPrecondition for a newer format_version.
absl::StatusOr<RegistryDocument> ParseRegistryDocument(absl::string_view json,
                                                       absl::string_view where);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_REGISTRY_DOCUMENT_H_
