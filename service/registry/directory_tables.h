// What a directory of table files holds, from one look to the next: which state of each file was
// read, its last good table and why it was refused. Hands the whole set to the registry.
#ifndef KEEPSET_SERVICE_REGISTRY_DIRECTORY_TABLES_H_
#define KEEPSET_SERVICE_REGISTRY_DIRECTORY_TABLES_H_

#include <map>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "service/registry/stable_read.h"
#include "service/registry/table_loader.h"
#include "service/registry/table_registry.h"

namespace keepset::service {

// Whether a directory entry of this name is meant to be a table: *.safetensors, and neither a dot
// file nor what editors and writers put beside one ("x.safetensors~", ".x.safetensors.swp",
// "x.safetensors.tmp").
bool IsTableFileName(absl::string_view name);

// Not thread-safe: one thread scans.
class DirectoryTables {
 public:
  // `registry`, `loader` and `clock` outlive this.
  DirectoryTables(std::string directory, TableRegistry& registry, TableLoader& loader,
                  const Clock& clock)
      : directory_(std::move(directory)), registry_(registry), loader_(loader), clock_(clock) {}

  enum class Outcome {
    kComplete,
    kUnfinished,  // a file is being written or has just been: scan again soon, event or not
  };

  // Reads every new or changed file, then hands the set to the registry. An error is the
  // directory's own (NotFound, PermissionDenied, InvalidArgument, Internal) and leaves everything
  // as it was.
  absl::StatusOr<Outcome> Scan();

 private:
  struct Entry {
    std::optional<FileIdentity> seen;            // the state last looked at
    std::optional<FileIdentity> seen_signature;  // of the file beside it; absent: there is none
    absl::Duration seen_since;                   // Clock::Monotonic() of the first look at it
    bool decided = false;                        // that state was read, or refused
    // Read so soon after the file's time stamps that a second write may have left them the same, or
    // refused for a reason that passes.
    bool look_again = false;
    TablePtr latest;       // of the last state that was a valid table
    TablePtr delivered;    // handed over last
    absl::Status refusal;  // of the state last looked at; OK: none
  };

  Outcome Update(const std::string& name, Entry& entry);
  Outcome Refuse(const std::string& name, Entry& entry, const absl::Status& why);
  bool IsOneMoment() const;
  SourceSet Collect();

  const std::string directory_;
  TableRegistry& registry_;
  TableLoader& loader_;
  const Clock& clock_;
  std::map<std::string, Entry> entries_;  // by file name
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_DIRECTORY_TABLES_H_
