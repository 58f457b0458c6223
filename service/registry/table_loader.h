// From the bytes of a table file to a table that may be served: the one way every source and
// upload takes. Validation is complete here; what must hold for all of them (a signature, where the
// bytes are kept) is a loader around a loader. Thread-safe; blocks.
#ifndef KEEPSET_SERVICE_REGISTRY_TABLE_LOADER_H_
#define KEEPSET_SERVICE_REGISTRY_TABLE_LOADER_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "service/registry/registry_types.h"

namespace keepset::service {

class StateDirectory;

struct TableCandidate {
  std::string bytes;
  std::string label;      // file, key: begins every message
  std::string signature;  // detached, as the source found it beside the table; empty: none
};

class TableLoader {
 public:
  virtual ~TableLoader() = default;
  // InvalidArgument, FailedPrecondition: refused, naming label, field, value and what would be
  // right. PermissionDenied: not signed by somebody trusted.
  virtual absl::StatusOr<TablePtr> LoadTable(TableCandidate candidate) = 0;
};

// Validates and keeps the file's bytes in memory, once.
std::unique_ptr<TableLoader> NewTableLoader();

// Validates, copies the file and the signature it came with into `state` and serves the table from
// a private mapping of that copy: page cache instead of memory. The same content is one table,
// whoever brings it. With the last reference to a table its copy goes, unless the state's document
// names it: what a registry refused does not stay. `state` outlives the loader; tables may outlive
// both.
std::unique_ptr<TableLoader> NewMappingTableLoader(StateDirectory& state);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_TABLE_LOADER_H_
