// The registry as a plain state machine: what is loaded by whom, what was decided, and the rules
// that follow. No locks, no files, no clock; TableRegistry copies a state, changes the copy and
// publishes it or throws it away.
#ifndef KEEPSET_SERVICE_REGISTRY_REGISTRY_STATE_H_
#define KEEPSET_SERVICE_REGISTRY_REGISTRY_STATE_H_

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "service/registry/registry_types.h"
#include "service/registry/table_registry.h"
#include "service/registry/version_order.h"
#include "tables/table_store.h"

namespace keepset::service {

struct VersionOrder {
  bool operator()(const std::string& a, const std::string& b) const { return VersionLess(a, b); }
};

struct Holder {
  std::string origin;
  ActivationRule rule = ActivationRule::kOnRequest;

  bool operator==(const Holder&) const = default;
};

// A loaded version. Without a holder it stays while it is chosen (active, canary, alias).
struct LoadedVersion {
  TablePtr table;
  std::map<std::string, Holder> holders;  // by source
  absl::Time loaded;
  absl::Time since;  // of its present state
};

struct RetiredVersion {
  TableTarget target;
  TablePtr table;  // kept while Rollback may want it
  std::string origin;
  std::string reason;
  absl::Time loaded;
  absl::Time since;
};

struct Line {
  std::map<std::string, LoadedVersion, VersionOrder> loaded;  // by version
  std::vector<RetiredVersion> retired;                        // oldest first
  LineAssignment assignment;
  std::optional<uint64_t> shared_revision;  // SharedRevisions::lines, when last there
};

struct RegistryState {
  std::map<std::string, Line> lines;
  std::map<std::pair<std::string, std::string>, SourceFailure> failures;  // by source and origin
  std::map<std::string, SourceView> sources;
  std::optional<uint64_t> shared_revision;
  std::string shared_source;  // whose that is
};

// The loaded version `target` means, or nullptr.
const LoadedVersion* FindTarget(const Line& line, const TableTarget& target);
LoadedVersion* FindTarget(Line& line, const TableTarget& target);
bool IsActive(const Line& line, const LoadedVersion& version);
// Whether a canary or an alias names it.
bool IsNamed(const Line& line, const LoadedVersion& version);
TableTarget TargetOf(const tables::DecisionTable& table);

// The one loaded version that matches; NotFound, FailedPrecondition (several), InvalidArgument
// (nothing asked, alias without name).
absl::StatusOr<TableTarget> FindVersion(const RegistryState& state, const TableRef& ref,
                                        std::string* name);
std::string DescribeRef(const TableRef& ref);

// `target` becomes the active version: history, times. It must be loaded.
void SetActive(Line& line, const TableTarget& target, absl::string_view actor,
               absl::string_view cause, absl::Time now);

// Applies a source's set, without Settle. Tables that cannot be taken become failures.
void ApplySourceSet(RegistryState& state, absl::string_view source, SourceSet set, absl::Time now,
                    std::vector<std::string>& unresolved);

// Restores the rules after a change: what nobody holds or chose retires, the newest is active where
// nobody chose, a canary that became active or no longer fits ends.
void Settle(RegistryState& state, absl::Time now);

std::shared_ptr<LineView> ViewOf(const RegistryState& state, const std::string& name,
                                 const std::function<bool(const std::string&)>& is_durable);
std::vector<TableVersionInfo> NamelessOf(const RegistryState& state);
tables::TableSnapshot SnapshotOf(const RegistryState& state);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_REGISTRY_STATE_H_
