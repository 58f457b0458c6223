// Where tables come from; listed in sources.def. A source owns its thread, turns what it finds into
// tables through the TableLoader and hands whole sets to the registry (TableRegistry::Sync), which
// decides what is active and publishes it.
#ifndef KEEPSET_SERVICE_REGISTRY_TABLE_SOURCE_H_
#define KEEPSET_SERVICE_REGISTRY_TABLE_SOURCE_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "service/registry/etcd_source_options.h"
#include "service/registry/registry_authority.h"
#include "service/registry/table_loader.h"
#include "service/registry/table_registry.h"

namespace keepset::service {

class TableSource {
 public:
  virtual ~TableSource() = default;  // stops and joins
  // Its name in TableRegistry::Sync, too.
  virtual absl::string_view kind() const = 0;

  // Reads what is there, hands it over and begins to watch. NotFound / PermissionDenied when the
  // source itself cannot be read; damaged tables are failures of the set and do not fail the start.
  virtual absl::Status Start() = 0;
  virtual void Stop() = 0;

  // Who takes writes while this source runs, instead of the local authority; nullptr: it does not
  // decide. Valid as long as the source.
  virtual RegistryAuthority* authority() { return nullptr; }
};

// What every source works with; all of it outlives the source.
struct TableSourceContext {
  TableRegistry& registry;
  TableLoader& loader;
  const Clock& clock;
};

struct DirectorySourceOptions {
  std::string directory;
  // Quiet time after a change before files are read; a rename storm becomes one reload.
  absl::Duration debounce = absl::Milliseconds(50);
  // Full re-scan without an event, for filesystems that send none.
  absl::Duration rescan = absl::Seconds(30);
};

// Each source reads its own member.
struct TableSourceOptions {
  DirectorySourceOptions directory;
  EtcdSourceOptions etcd = {};
};

// Watches a directory of *.safetensors table files with inotify (close-after-write, renames, the
// Kubernetes `..data` swap). Dot files and editor swap files are not tables. Several files may hold
// versions of one table name; one version in two files: the second in file-name order is refused,
// naming both.
std::unique_ptr<TableSource> NewDirectorySource(const TableSourceOptions& options,
                                                const TableSourceContext& context);

// A fleet's tables and decisions in etcd, followed by one watch per server; takes the writes, which
// come back by that watch. Where etcd cannot be reached Start succeeds all the same: the registry
// keeps what it has, the source's health says so, and the source comes back by itself.
// InvalidArgument from Start: options that cannot be used.
std::unique_ptr<TableSource> NewEtcdSource(const TableSourceOptions& options,
                                           const TableSourceContext& context);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_TABLE_SOURCE_H_
