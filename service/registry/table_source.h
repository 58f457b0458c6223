// Where active tables come from; listed in sources.def. A source owns its thread, validates
// completely off the hot path and publishes whole sets into a TableStore in one swap.
#ifndef KEEPSET_SERVICE_REGISTRY_TABLE_SOURCE_H_
#define KEEPSET_SERVICE_REGISTRY_TABLE_SOURCE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "tables/decision_table.h"
#include "tables/table_store.h"

namespace keepset::service {

// What a source tells metrics and the log; called from Start, then from the source's thread.
class TableSourceObserver {
 public:
  virtual ~TableSourceObserver() = default;
  // A set was published: the tables now active.
  virtual void OnPublished(const tables::TableSnapshot& /*snapshot*/) {}
  // One file was refused, or the source itself cannot be read any more; the last good version, if
  // any, stays active. Told once per change, not on every re-scan.
  virtual void OnRefused(absl::string_view /*file*/, const absl::Status& /*why*/) {}
};

class TableSource {
 public:
  virtual ~TableSource() = default;  // stops and joins
  virtual absl::string_view kind() const = 0;

  // Reads what is there, publishes it and begins to watch. NotFound / PermissionDenied when the
  // source itself cannot be read; damaged tables are reported to the observer and do not fail the
  // start.
  virtual absl::Status Start() = 0;
  virtual void Stop() = 0;
};

struct DirectorySourceOptions {
  std::string directory;
  // Quiet time after a change before files are read; a rename storm becomes one reload.
  absl::Duration debounce = absl::Milliseconds(50);
  // Full re-scan without an event, for filesystems that send none.
  absl::Duration rescan = absl::Seconds(30);
};

// Watches a directory of *.safetensors table files with inotify (close-after-write, renames, the
// Kubernetes `..data` swap). Dot files and editor swap files are not tables. One table name in two
// files: the second in file-name order is refused, naming both. `store`, `clock` and `observer`
// must outlive the source; observer may be nullptr.
std::unique_ptr<TableSource> NewDirectorySource(const DirectorySourceOptions& options,
                                                tables::TableStore& store, const Clock& clock,
                                                TableSourceObserver* observer);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_TABLE_SOURCE_H_
