// Who decides what is loaded and active. Every write of TableService goes through one authority.
//
// The local authority (NewLocalAuthority) changes this server's registry at once. An authority of
// a fleet (etcd) writes the wish there, conditionally, and answers when the watch has brought it
// back into this server's registry by TableRegistry::Sync; nothing is applied beside that.
// Calls may block and come from several threads at once. A refused write has changed nothing.
#ifndef KEEPSET_SERVICE_REGISTRY_REGISTRY_AUTHORITY_H_
#define KEEPSET_SERVICE_REGISTRY_REGISTRY_AUTHORITY_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "service/registry/registry_types.h"

namespace keepset::service {

struct WriteContext {
  std::string actor;  // for history and audit; may be empty
  // Compare-and-set on LineView::revision; 0: any. Aborted when the line has another one.
  uint64_t expected_revision = 0;
  // UTC; an authority that waits gives up then with DeadlineExceeded and says that the wish stands.
  absl::Time deadline = absl::InfiniteFuture();
};

struct LoadArgs {
  std::string bytes;            // the file, within the size cap already
  std::string origin;           // "upload", a path: for messages and TableVersionInfo::origin
  std::string expected_digest;  // empty: any
  std::string signature;        // detached; empty: none
};

struct LoadReceipt {
  TableVersionInfo version;
  uint64_t revision = 0;
  bool durable = false;
  bool already_loaded = false;
};

struct WriteReceipt {
  uint64_t revision = 0;                 // every view and snapshot from this one on has the change
  std::shared_ptr<const LineView> line;  // after the change
  std::string previous_version;          // active before; empty: none
  bool durable = false;
};

class RegistryAuthority {
 public:
  virtual ~RegistryAuthority() = default;
  virtual absl::string_view kind() const = 0;  // "local", "etcd"

  // InvalidArgument, FailedPrecondition: the table is refused. AlreadyExists: name and version are
  // loaded with other content. ResourceExhausted, PermissionDenied, Internal: it cannot be kept.
  virtual absl::StatusOr<LoadReceipt> Load(const LoadArgs& args, const WriteContext& context) = 0;
  // `set_alias` (may be empty) names the version too, in the same change.
  virtual absl::StatusOr<WriteReceipt> Activate(const TableRef& table, absl::string_view set_alias,
                                                const WriteContext& context) = 0;
  // Back to LineMode::kNewest.
  virtual absl::StatusOr<WriteReceipt> FollowNewest(absl::string_view name,
                                                    const WriteContext& context) = 0;
  virtual absl::StatusOr<WriteReceipt> Rollback(absl::string_view name,
                                                const WriteContext& context) = 0;
  // basis_points 0 ends the canary; an empty salt means the digest.
  virtual absl::StatusOr<WriteReceipt> SetCanary(const TableRef& table, int basis_points,
                                                 absl::string_view salt,
                                                 const WriteContext& context) = 0;
  // A `table` without version, digest and alias removes the alias.
  virtual absl::StatusOr<WriteReceipt> SetAlias(absl::string_view name, absl::string_view alias,
                                                const TableRef& table,
                                                const WriteContext& context) = 0;
  virtual absl::StatusOr<WriteReceipt> Unload(const TableRef& table,
                                              const WriteContext& context) = 0;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_REGISTRY_AUTHORITY_H_
