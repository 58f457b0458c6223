// Typed client of TableService: which table versions a server has, which one unpinned requests
// get, and changing that.
#ifndef KEEPSET_CLIENTS_CPP_TABLE_CLIENT_H_
#define KEEPSET_CLIENTS_CPP_TABLE_CLIENT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "clients/cpp/client.h"
#include "clients/cpp/operation.h"

namespace keepset::client {

// One version of a line (everything under one table name). Every field that is set must match.
struct TableRef {
  std::string name;
  std::string version;
  std::string digest;  // "sha256:<hex>"
  std::string alias;   // "stable" (the active version), "canary", or an operator's own
};

enum class TableState { kValidating, kReady, kActive, kRetired, kFailed };
absl::string_view TableStateName(TableState state);  // "ready"

struct TableVersion {
  std::string name;
  std::string version;
  std::string digest;
  std::string kind;
  std::string provenance;
  absl::Time created = absl::InfinitePast();  // infinite past: not stated
  ModelFingerprint model;
  TableState state = TableState::kReady;
  std::string reason;                // why failed or retired
  std::vector<std::string> sources;  // that hold it now
  std::string origin;                // file name, key ... within its source
  absl::Time loaded;
  absl::Time state_since;
  bool durable = false;  // a restarted server has it before any source answers
  uint64_t bytes = 0;
};

struct TableCanary {
  std::string version;
  std::string digest;
  double percent = 0.0;
  std::string salt;
};

struct TableAlias {
  std::string alias;
  std::string version;
  std::string digest;
};

struct TableActivation {
  std::string version;
  std::string digest;
  absl::Time time;
  std::string actor;
  std::string cause;
  bool undone = false;
};

struct TableLine {
  std::string name;
  uint64_t revision = 0;
  bool follows_newest = false;  // the newest version of a watched directory becomes active
  std::string active_version;   // empty: none
  std::string active_digest;
  std::optional<TableCanary> canary;
  std::vector<TableAlias> aliases;
  std::vector<TableActivation> history;  // oldest first
  std::vector<TableVersion> versions;
};

struct TableSource {
  std::string source;
  bool healthy = false;
  std::string detail;
  absl::Time since;
};

struct TableList {
  uint64_t revision = 0;
  std::vector<TableLine> lines;
  std::vector<TableVersion> nameless;  // refused or validating, of no known line
  std::vector<TableSource> sources;
  bool writable = false;
  std::string authority;  // "local", "etcd"
};

struct TableDetails {
  TableVersion version;
  std::string inspect_json;
  uint64_t revision = 0;  // of its line
  // What any operation with the table has to send; absent where the server has no policy for it.
  std::optional<InputNeeds> needs;
};

struct TableFinding {
  enum class Severity { kError, kWarning, kNote };
  Severity severity = Severity::kNote;
  std::string message;
};

struct TableValidation {
  bool valid = false;
  std::vector<TableFinding> findings;
  std::optional<TableVersion> version;
};

// Of every write: who asks, and compare-and-set on TableLine::revision (0: whatever it is).
struct TableWrite {
  std::string actor;
  uint64_t expected_revision = 0;
};

struct TableWriteResult {
  uint64_t revision = 0;
  TableLine line;
  std::string previous_version;
  bool durable = false;
};

struct TableUpload {
  std::string expected_digest;  // empty: any
  std::string signature;        // detached, where the server checks signatures
  std::string actor;
};

struct TableUploadResult {
  TableVersion version;
  uint64_t revision = 0;
  bool durable = false;
  bool already_loaded = false;
};

struct TableChange {
  uint64_t revision = 0;
  bool complete = false;  // the first: lines are all there are
  std::vector<TableLine> lines;
  std::vector<std::string> removed;
  std::vector<TableSource> sources;  // all of them, when one changed
};

// Opens no session. Thread-safe. Errors carry the server's codes (keepset/v1/table.proto);
// Unavailable also when nobody answers within call_timeout.
class TableClient {
 public:
  // Does not wait for the server. InvalidArgument: an address of another form, unusable TLS.
  static absl::StatusOr<std::unique_ptr<TableClient>> New(const ClientOptions& options);
  virtual ~TableClient() = default;

  // Empty name, empty architecture: all.
  virtual absl::StatusOr<TableList> List(const std::string& name,
                                         const std::string& architecture) = 0;
  virtual absl::StatusOr<TableDetails> Get(const TableRef& table) = 0;
  virtual absl::StatusOr<TableValidation> Validate(const std::string& file_bytes,
                                                   const std::string& signature) = 0;

  virtual absl::StatusOr<TableUploadResult> Load(const std::string& file_bytes,
                                                 const TableUpload& upload) = 0;
  // `path` is relative to the server's tables directory.
  virtual absl::StatusOr<TableUploadResult> LoadPath(const std::string& path,
                                                     const TableUpload& upload) = 0;
  // `set_alias` (may be empty) names the version too, in the same change.
  virtual absl::StatusOr<TableWriteResult> Activate(const TableRef& table,
                                                    const std::string& set_alias,
                                                    const TableWrite& write) = 0;
  virtual absl::StatusOr<TableWriteResult> FollowNewest(const std::string& name,
                                                        const TableWrite& write) = 0;
  virtual absl::StatusOr<TableWriteResult> Rollback(const std::string& name,
                                                    const TableWrite& write) = 0;
  // percent 0 ends the canary; an empty salt stands for the version's digest.
  virtual absl::StatusOr<TableWriteResult> SetCanary(const TableRef& table, double percent,
                                                     const std::string& salt,
                                                     const TableWrite& write) = 0;
  // An empty `table` removes the alias.
  virtual absl::StatusOr<TableWriteResult> SetAlias(const std::string& name,
                                                    const std::string& alias, const TableRef& table,
                                                    const TableWrite& write) = 0;
  virtual absl::StatusOr<TableWriteResult> Unload(const TableRef& table,
                                                  const TableWrite& write) = 0;

  enum class Next { kContinue, kStop };
  // The state now, then every change until `on_change` stops it, `until_active` (when set) is
  // active, or `deadline`: DeadlineExceeded.
  virtual absl::Status Watch(const std::string& name, const std::optional<TableRef>& until_active,
                             absl::Time deadline,
                             const std::function<Next(const TableChange&)>& on_change) = 0;
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_TABLE_CLIENT_H_
