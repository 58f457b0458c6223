// The table registry: lines, versions, aliases, canaries and activation history of one server, and
// the one publisher of the TableStore operations read.
//
// Sources hand over everything they hold by Sync; operators' wishes arrive through a
// RegistryAuthority. Each change is one revision and one swap of the published snapshot, so an
// operation sees the whole of it or nothing. Thread-safe: changes are made one after the other,
// readers never wait for them. The registry starts no thread.
#ifndef KEEPSET_SERVICE_REGISTRY_TABLE_REGISTRY_H_
#define KEEPSET_SERVICE_REGISTRY_TABLE_REGISTRY_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/clock.h"
#include "service/registry/registry_authority.h"
#include "service/registry/registry_types.h"
#include "service/registry/table_loader.h"
#include "tables/table_store.h"

namespace keepset::service {

class StateDirectory;

// The state directory's name among the sources' health.
inline constexpr absl::string_view kStateSource = "state";

// What a source holds that may be served.
struct SourceTable {
  TablePtr table;
  std::string origin;  // file name, key: unique within the source
};

// What a source could not read, or has not finished reading.
struct SourceFailure {
  std::string origin;
  // Which state of the origin this is about (time stamps, revision): a failure is told again when
  // it or the message changes.
  std::string instance;
  absl::Status why;     // OK: still validating
  std::string name;     // as far as known
  std::string version;  // likewise
  absl::Time since;     // set by the registry
};

// Who makes a newly delivered version active.
enum class ActivationRule {
  kNewest,     // the registry, in lines of mode kNewest: newest by provenance.created, then by
               // natural order of the version
  kOnRequest,  // an Activate, or the source's assignments
};

// Of content that several servers share: numbers that are the same on all of them for the same
// content.
struct SharedRevisions {
  std::string source;                     // set by the registry
  uint64_t revision = 0;                  // of the whole
  std::map<std::string, uint64_t> lines;  // of what is there of each line

  bool operator==(const SharedRevisions&) const = default;
};

// All a source has at one moment; replaces what it delivered before.
struct SourceSet {
  ActivationRule rule = ActivationRule::kOnRequest;
  // Of one name and version with different content the first stays, the later ones become failures.
  std::vector<SourceTable> tables;
  std::vector<SourceFailure> failures;
  // What the source decides about lines, by name: applied in the same change as `tables`. Lines
  // that are not named keep what the registry knows of them. Targets that are not loaded leave that
  // role as it was and come back in SyncOutcome::unresolved. An assignment's history may be empty:
  // the registry then appends an activation with cause `source`.
  std::map<std::string, LineAssignment> assignments;
  std::optional<SharedRevisions> shared;
};

struct SyncOutcome {
  uint64_t revision = 0;
  std::vector<std::string> unresolved;  // "name: active version@digest is not loaded"
};

// What the registry tells metrics, health and log. Called in order of revisions, by the thread that
// made the change, while other changes wait: short, and never back into the registry.
class RegistryObserver {
 public:
  virtual ~RegistryObserver() = default;
  // `before` is nullptr for the first state. The snapshot is the one published with `after`.
  virtual void OnChanged(const RegistryView* /*before*/, const RegistryView& /*after*/,
                         const tables::TableSnapshot& /*snapshot*/) {}
  // A source handed its set over, whether or not anything changed by that.
  virtual void OnSynced(absl::string_view /*source*/) {}
  // A table was refused; the last good one of that origin, if any, stays. Once per instance.
  virtual void OnRefused(absl::string_view /*source*/, absl::string_view /*origin*/,
                         const absl::Status& /*why*/) {}
  // A source's health changed; "state" stands for the state directory.
  virtual void OnSourceHealth(absl::string_view /*source*/, const absl::Status& /*health*/) {}
};

// Whether a table that was kept may be served; `label` begins the message. Its signature is empty
// where it came without one.
using RecoveryCheck = std::function<absl::Status(
    absl::Span<const std::byte> bytes, absl::string_view signature, absl::string_view label)>;

struct TableRegistryOptions {
  // Outlives the registry; nobody else publishes into it.
  tables::TableStore* store = nullptr;
  const Clock* clock = nullptr;
  RegistryObserver* observer = nullptr;  // may be nullptr
  // Where choices, uploads and active tables survive a restart; nullptr: nowhere.
  StateDirectory* state = nullptr;
  // Kinds of the sources that will Sync. What the state directory knows of others is theirs no
  // longer.
  std::vector<std::string> sources = {};
  // Asked about every table of the state directory; nullptr: all may. One that may not is failed,
  // and stays on disk for a start that allows it.
  RecoveryCheck recovery_check = nullptr;
};

class TableRegistry {
 public:
  // Recovers what the state directory holds and publishes it, so that the active tables answer
  // before any source does. A table file it cannot read is left out and told (OnSourceHealth
  // "state"). InvalidArgument, FailedPrecondition: registry.json is damaged or newer, and what was
  // chosen is not known.
  static absl::StatusOr<std::unique_ptr<TableRegistry>> New(const TableRegistryOptions& options);
  virtual ~TableRegistry() = default;

  // ---- sources
  // Nothing changed: same revision, nothing published. A version its source no longer holds retires
  // at once in mode kNewest; one that was chosen (active, canary, alias) stays until something else
  // is. A registry that cannot save serves the change and says so (OnSourceHealth "state").
  virtual SyncOutcome Sync(absl::string_view source, SourceSet set) = 0;
  virtual void SetSourceHealth(absl::string_view source, const absl::Status& health) = 0;

  // ---- readers
  virtual std::shared_ptr<const RegistryView> View() const = 0;
  // NotFound, or FailedPrecondition when several loaded versions match.
  virtual absl::StatusOr<TableVersionInfo> Find(const TableRef& table) const = 0;
  // `listener` is called with every later view, as RegistryObserver is, until Unsubscribe returns.
  // The view returned is the one before the first of them.
  virtual std::shared_ptr<const RegistryView> Subscribe(
      uint64_t* id, std::function<void(std::shared_ptr<const RegistryView>)> listener) = 0;
  virtual void Unsubscribe(uint64_t id) = 0;

  // ---- changes by the local authority; same contracts as RegistryAuthority. Saved before they
  // take effect: what cannot be saved is refused and has changed nothing.
  virtual absl::StatusOr<LoadReceipt> Load(SourceTable table, const WriteContext& context) = 0;
  virtual absl::StatusOr<WriteReceipt> Activate(const TableRef& table, absl::string_view set_alias,
                                                const WriteContext& context) = 0;
  virtual absl::StatusOr<WriteReceipt> FollowNewest(absl::string_view name,
                                                    const WriteContext& context) = 0;
  virtual absl::StatusOr<WriteReceipt> Rollback(absl::string_view name,
                                                const WriteContext& context) = 0;
  virtual absl::StatusOr<WriteReceipt> SetCanary(const TableRef& table, int basis_points,
                                                 absl::string_view salt,
                                                 const WriteContext& context) = 0;
  virtual absl::StatusOr<WriteReceipt> SetAlias(absl::string_view name, absl::string_view alias,
                                                const TableRef& table,
                                                const WriteContext& context) = 0;
  virtual absl::StatusOr<WriteReceipt> Unload(const TableRef& table,
                                              const WriteContext& context) = 0;
};

// Writes straight into `registry`. Both outlive the authority.
std::unique_ptr<RegistryAuthority> NewLocalAuthority(TableRegistry& registry, TableLoader& loader);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_TABLE_REGISTRY_H_
