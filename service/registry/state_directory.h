// The directory that lets a registry survive its process: table files named by their digest
// (`sha256-<hex>.safetensors`, written once, never changed), the signatures they came with
// (`sha256-<hex>.safetensors.sig`) and `registry.json`.
//
// One server at a time holds a directory, by a lock on `.lock`. A table file that was not synced
// when the machine stopped shows by its digest and is left out. Thread-safe; calls block on the
// disk.
#ifndef KEEPSET_SERVICE_REGISTRY_STATE_DIRECTORY_H_
#define KEEPSET_SERVICE_REGISTRY_STATE_DIRECTORY_H_

#include <map>
#include <memory>
#include <set>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "service/registry/registry_document.h"
#include "service/registry/registry_types.h"

namespace keepset::service {

class StateDirectory {
 public:
  // Creates the directory (mode 0700) when it is missing. FailedPrecondition: another process holds
  // it. PermissionDenied, ResourceExhausted, InvalidArgument, Internal: it cannot be used.
  static absl::StatusOr<std::unique_ptr<StateDirectory>> Open(const std::string& path);
  ~StateDirectory();
  StateDirectory(const StateDirectory&) = delete;
  StateDirectory& operator=(const StateDirectory&) = delete;

  const std::string& path() const { return path_; }

  // NotFound: nothing was saved yet. Otherwise as ParseRegistryDocument.
  absl::StatusOr<RegistryDocument> ReadDocument();
  // Atomically and synced; the tables it names must be synced before.
  absl::Status WriteDocument(const RegistryDocument& document);

  // Whether Keep has put the file of `digest` here.
  bool Has(absl::string_view digest) const;
  // Writes the file when it is missing, or is not what its name says. Not synced: see Sync.
  absl::Status Keep(absl::string_view digest, absl::Span<const std::byte> bytes);
  // The detached signature that the file of `digest` came with, written before the file is. Where
  // the file is here already, at once.
  absl::Status KeepSignature(absl::string_view digest, absl::string_view signature);
  // Empty: none was kept, or it cannot be read.
  std::string Signature(absl::string_view digest) const;
  // The file is on the medium when this returns OK.
  absl::Status Sync(absl::string_view digest);
  // A table in a private mapping of its file. NotFound; DataLoss: the file is not what its name
  // says; otherwise as MapTable.
  absl::StatusOr<TablePtr> Map(absl::string_view digest) const;
  void Remove(absl::string_view digest);
  // Unless the document that was read or written last names it.
  void RemoveUnnamed(absl::string_view digest);
  // Removes every table file but those of `digests`.
  void RemoveOthers(const std::set<std::string>& digests);

 private:
  StateDirectory(std::string path, int lock_fd) : path_(std::move(path)), lock_fd_(lock_fd) {}
  std::string FileOf(absl::string_view digest) const;
  absl::Status WriteSignature(absl::string_view digest) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Name(const RegistryDocument& document) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void RemoveLocked(absl::string_view digest) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string path_;
  const int lock_fd_;
  mutable absl::Mutex mutex_;
  std::set<std::string, std::less<>> kept_ ABSL_GUARDED_BY(mutex_);
  std::set<std::string, std::less<>> synced_ ABSL_GUARDED_BY(mutex_);
  std::set<std::string, std::less<>> named_ ABSL_GUARDED_BY(mutex_);  // by the document
  std::map<std::string, std::string, std::less<>> unwritten_signatures_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_STATE_DIRECTORY_H_
