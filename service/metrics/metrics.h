// Every series keepsetd exports, created at start, with bounded labels. metric_names.h is the one
// list of names; docs/metrics.md is generated from it.
//
// Thread-safe; recording takes no lookup (references are cached). Owns the Prometheus registry.
#ifndef KEEPSET_SERVICE_METRICS_METRICS_H_
#define KEEPSET_SERVICE_METRICS_METRICS_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "service/metrics/process_usage.h"

namespace keepset::service {

// Names of the stages an operation passes, in order.
enum class Stage { kQueue, kLease, kScore, kSelect, kGather, kReply };
inline constexpr int kNumStages = 6;

// What one ended operation adds. Names are those of formats.md.
struct OperationSample {
  struct Table {
    std::string name;
    std::string version;
    std::string digest;

    bool operator==(const Table&) const = default;
  };

  std::string policy;          // a policy of this build, else kUnknownPolicy
  std::string model;           // architecture the request states
  std::optional<Table> table;  // that decided, or was to
  std::string outcome;         // "compressed", "kept_full", "shadow", "error", "cancelled"
  std::string reason;          // "none", "below_budget" ..., or the canonical code of an error
  absl::Duration stages[kNumStages] = {};
  int64_t input_tokens = 0;  // T x layers
  int64_t kept_tokens = 0;   // sum over layers (mean over KV heads in scope kv_head)
  int64_t bytes_before = 0;
  int64_t bytes_after = 0;
  // Cell of the table's grid, where the operation has one.
  std::optional<int64_t> entropy_bin;
  std::optional<int64_t> ppl_bin;
  std::vector<std::string> defaulted_inputs;
};

// What asking a second table about an operation came to.
struct ShadowSample {
  enum class Result {
    kScored,
    kSkipped,  // the operation decided nothing, or there was no time to spare
    kFailed,
  };
  Result result = Result::kScored;
  // kScored only.
  double kept_overlap = 0;
  int64_t decided_bytes = 0;
  int64_t would_be_bytes = 0;
  absl::Duration time;
};

struct TableInfoSample {
  std::string model;  // architecture
  std::string name;
  std::string version;
  std::string digest;
  absl::Time created = absl::UnixEpoch();  // the epoch: not known
  // Cells of its grid; 0 for kinds without one.
  int64_t num_entropy_bins = 0;
  int64_t num_ppl_bins = 0;
};

// Memory of the server's own that workers may map.
struct OwnedMemorySample {
  uint64_t bytes = 0;  // quarantined_bytes included
  int64_t quarantined_regions = 0;
  uint64_t quarantined_bytes = 0;
};

// Device memory of this server for operations.
struct DeviceWorkspaceSample {
  int64_t reserved_bytes = 0;
  int64_t used_bytes = 0;
  int64_t peak_bytes = 0;  // of used, since the start
};

enum class Reject {
  kQueueFull,
  kStreamFull,  // too many operations are open on the stream
  kNoCredit,    // a layer beyond the stream's credit
  kNoMemory,
  kInlineTooLarge,
  kDraining,
  kInvalid,
  kNotFound,
  kPrecondition,
  kFence
};

class Metrics {
 public:
  struct BuildInfo {
    std::string version;
    std::string backend;
  };
  // The values labels are bounded by.
  struct LabelValues {
    std::vector<std::string> policies;
    std::vector<std::string> region_kinds;
    std::vector<std::string> defaulted_inputs;
    std::vector<std::string> table_sources;
  };
  static std::unique_ptr<Metrics> New(const BuildInfo& build, const LabelValues& values);
  virtual ~Metrics() = default;

  virtual void RecordOperation(const OperationSample& sample) = 0;
  virtual void RecordReject(Reject why) = 0;
  virtual void RecordShadow(const ShadowSample& sample) = 0;
  virtual void SetQueueDepth(int64_t waiting) = 0;
  virtual void SetQueueCapacity(int64_t capacity) = 0;
  virtual void SetOperationsInFlight(int64_t running) = 0;
  virtual void AddCredits(int64_t change) = 0;

  // Replaces the series of tables and models, and makes room for their grids.
  virtual void SetTables(const std::vector<TableInfoSample>& tables, absl::Time now) = 0;
  enum class Reload { kSuccess, kRefused };
  virtual void RecordReload(Reload result) = 0;

  virtual void EnableTableSource(absl::string_view source) = 0;
  virtual void RecordSourceSync(absl::string_view source, absl::Time now) = 0;
  virtual void RecordSourceFailure(absl::string_view source) = 0;

  virtual void SetProcessUsage(const ProcessUsage& usage) = 0;
  virtual void SetSessions(int64_t sessions) = 0;
  virtual void SetRegions(absl::string_view kind, int64_t regions, uint64_t bytes) = 0;
  virtual void SetDeviceMemory(absl::string_view kind, uint64_t bytes) = 0;
  virtual void SetOwnedMemory(absl::string_view kind, const OwnedMemorySample& sample) = 0;
  virtual void SetDeviceWorkspace(const DeviceWorkspaceSample& use) = 0;
  virtual void RecordSessionEnd(absl::string_view why) = 0;  // "closed", "replaced", "hang_up", ...
  virtual void RecordImportFailure(absl::string_view kind) = 0;

  // The page in Prometheus text format.
  virtual std::string Render() const = 0;

  // Serves the page on "host:port" (port 0: free one); returns the bound "host:port".
  // AlreadyExists when the port is taken.
  virtual absl::StatusOr<std::string> Serve(const std::string& address) = 0;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_METRICS_METRICS_H_
