// What a directory of table files holds, from one look to the next: which state of each file was
// read, its last good table and what was said about it. Publishes a changed set in one swap.
#ifndef KEEPSET_SERVICE_REGISTRY_DIRECTORY_TABLES_H_
#define KEEPSET_SERVICE_REGISTRY_DIRECTORY_TABLES_H_

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "service/registry/stable_read.h"
#include "service/registry/table_source.h"
#include "tables/decision_table.h"
#include "tables/table_store.h"

namespace keepset::service {

// Whether a directory entry of this name is meant to be a table: *.safetensors, and neither a dot
// file nor what editors and writers put beside one ("x.safetensors~", ".x.safetensors.swp",
// "x.safetensors.tmp").
bool IsTableFileName(absl::string_view name);

// Not thread-safe: one thread scans.
class DirectoryTables {
 public:
  // `store`, `clock` and `observer` outlive this; observer may be nullptr.
  DirectoryTables(std::string directory, tables::TableStore& store, const Clock& clock,
                  TableSourceObserver* observer)
      : directory_(std::move(directory)), store_(store), clock_(clock), observer_(observer) {}

  enum class Outcome {
    kComplete,
    kUnfinished,  // a file is being written or has just been: scan again soon, event or not
  };

  // Reads every new or changed file, then publishes the set if it is another one than before; the
  // first scan always publishes. An error is the directory's own (NotFound, PermissionDenied,
  // InvalidArgument, Internal) and leaves everything as it was.
  absl::StatusOr<Outcome> Scan();

 private:
  using TablePtr = std::shared_ptr<const tables::DecisionTable>;

  struct Entry {
    std::optional<FileIdentity> seen;  // the state last looked at
    absl::Duration seen_since;         // Clock::Monotonic() of the first look at it
    bool decided = false;              // that state was read, or refused
    // Read so soon after the file's time stamps that a second write may have left them the same, or
    // refused for a reason that passes.
    bool look_again = false;
    TablePtr latest;           // of the last state that was a valid table
    TablePtr active;           // published last
    std::string told_refusal;  // what the observer knows
    std::string told_duplicate;
  };

  Outcome Update(const std::string& name, Entry& entry);
  // Tells the observer, once per state of the file.
  Outcome Refuse(const std::string& name, Entry& entry, const absl::Status& why);
  bool IsOneMoment() const;
  void PublishIfChanged();

  const std::string directory_;
  tables::TableStore& store_;
  const Clock& clock_;
  TableSourceObserver* const observer_;
  std::map<std::string, Entry> entries_;  // by file name
  std::optional<std::vector<TablePtr>> published_;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_DIRECTORY_TABLES_H_
