// Counts and times of ended operations since the server began, by model, policy and table: what
// GetStatistics answers, for all sessions together and for each open one.
#ifndef KEEPSET_SERVICE_METRICS_OPERATION_TOTALS_H_
#define KEEPSET_SERVICE_METRICS_OPERATION_TOTALS_H_

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "service/metrics/metrics.h"

namespace keepset::service {

// Operations of one model, policy and table.
struct OperationTotal {
  struct StageTotal {
    int64_t count = 0;  // operations that passed the stage
    absl::Duration time;
    absl::Duration longest;
  };

  std::string model;   // architecture
  std::string policy;  // OperationSample's
  std::optional<OperationSample::Table> table;
  std::map<std::pair<std::string, std::string>, int64_t> outcomes;  // by outcome and reason
  std::array<StageTotal, kNumStages> stages;
  int64_t input_tokens = 0;  // the units of OperationSample
  int64_t kept_tokens = 0;
  int64_t bytes_before = 0;
  int64_t bytes_after = 0;
};

// Thread-safe.
class OperationTotals {
 public:
  // Models are named by requests: what comes after this many rows is counted in one row of model
  // "other" and policy "other".
  static constexpr size_t kMaxRows = 256;
  static constexpr size_t kMaxRowsPerSession = 16;

  // Sessions that were never opened, or are forgotten, are not counted apart.
  void OpenSession(absl::string_view session_id);
  void ForgetSession(absl::string_view session_id);

  void Record(const OperationSample& sample, absl::string_view session_id);

  // Ordered by model, policy, table.
  std::vector<OperationTotal> All() const;
  // NotFound for a session that is not open.
  absl::StatusOr<std::vector<OperationTotal>> OfSession(absl::string_view session_id) const;

 private:
  // Model, policy, then name, version and digest of the table.
  using Key = std::array<std::string, 5>;
  using Rows = std::map<Key, OperationTotal>;

  static void Add(const Key& key, const OperationSample& sample, size_t max_rows, Rows& rows);

  mutable absl::Mutex mutex_;
  Rows all_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<std::string, Rows> sessions_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_METRICS_OPERATION_TOTALS_H_
