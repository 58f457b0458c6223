// What the table registry knows: lines (everything under one table name), their versions, which of
// them is active, canary or aliased, and how that came about. Plain values; a RegistryView is one
// immutable state of all of it.
#ifndef KEEPSET_SERVICE_REGISTRY_REGISTRY_TYPES_H_
#define KEEPSET_SERVICE_REGISTRY_REGISTRY_TYPES_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "tables/decision_table.h"

namespace keepset::service {

using TablePtr = std::shared_ptr<const tables::DecisionTable>;

enum class VersionState {
  kValidating,
  kReady,    // loaded; a request may pin it
  kActive,   // loaded; unpinned requests get it
  kRetired,  // was loaded; kept for the record, the last few also for Rollback
  kFailed,   // refused
};
absl::string_view VersionStateName(VersionState state);  // "ready"

enum class LineMode {
  kNewest,  // the newest version of a source with ActivationRule::kNewest is active
  kChosen,  // somebody chose; new versions only become ready
};

// One version of a line. `digest` decides; `version` is for people.
struct TableTarget {
  std::string version;
  std::string digest;

  bool operator==(const TableTarget&) const = default;
};

struct Canary {
  TableTarget target;
  int basis_points = 0;  // share of unpinned requests in 1/100 percent, 1..10000
  std::string salt;

  bool operator==(const Canary&) const = default;
};

struct Activation {
  TableTarget target;
  absl::Time time;
  std::string actor;  // empty: the registry itself
  std::string cause;  // "activate", "rollback", "newest", "etcd"
  bool undone = false;

  bool operator==(const Activation&) const = default;
};

// What was decided about a line; survives a restart, travels through etcd.
struct LineAssignment {
  LineMode mode = LineMode::kNewest;
  std::optional<TableTarget> active;
  std::optional<Canary> canary;
  std::map<std::string, TableTarget> aliases;  // the operator's own; not "stable", not "canary"
  std::vector<Activation> history;             // oldest first, at most kMaxHistory

  bool operator==(const LineAssignment&) const = default;
};

inline constexpr size_t kMaxHistory = 32;
// So many previous active versions of a line stay available to Rollback after their source dropped
// them.
inline constexpr size_t kRollbackDepth = 4;
inline constexpr absl::string_view kStableAlias = "stable";
inline constexpr absl::string_view kCanaryAlias = "canary";

struct TableVersionInfo {
  std::string name;     // empty: refused before its name was known
  std::string version;  // empty: likewise
  std::string digest;   // empty: likewise
  VersionState state = VersionState::kReady;
  std::string reason;                // why failed or retired; otherwise what is odd about it
  std::vector<std::string> sources;  // that hold it now, in alphabetical order
  std::string origin;                // file name, etcd key, "upload" ...
  absl::Time loaded;
  absl::Time state_since;
  bool durable = false;  // a restarted server has it before any source answers
  TablePtr table;        // nullptr: not in memory

  bool operator==(const TableVersionInfo&) const = default;
};

struct LineView {
  std::string name;
  // Of the line's last change: the fleet's where the line's source shares one, else this server's.
  uint64_t revision = 0;
  LineAssignment assignment;
  // Loaded ones first, by version in natural order, then validating, failed, retired.
  std::vector<TableVersionInfo> versions;
};

struct SourceView {
  std::string source;
  absl::Status health;  // OK, or why it cannot be read; what it delivered stays
  absl::Time since;     // of that health

  bool operator==(const SourceView&) const = default;
};

struct RegistryView {
  uint64_t revision = 0;  // this server's own: larger with every view
  // The same on every server that has the same from a source they share; goes back with it, too.
  std::optional<uint64_t> shared_revision;
  std::map<std::string, std::shared_ptr<const LineView>> lines;  // unchanged lines are shared
  std::vector<TableVersionInfo> nameless;  // validating or refused, of no known line
  std::vector<SourceView> sources;         // by name
};

// What people and clients see.
inline uint64_t ShownRevision(const RegistryView& view) {
  return view.shared_revision.value_or(view.revision);
}

// How a request for one version names it; empty fields do not constrain.
struct TableRef {
  std::string name;
  std::string version;
  std::string digest;
  std::string alias;  // needs a name
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_REGISTRY_TYPES_H_
