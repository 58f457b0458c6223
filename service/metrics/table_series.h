// The series whose labels follow the active tables: the tables, their models, the cells of their
// grids. Private to service/metrics. Thread-safe.
#ifndef KEEPSET_SERVICE_METRICS_TABLE_SERIES_H_
#define KEEPSET_SERVICE_METRICS_TABLE_SERIES_H_

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/registry.h"
#include "service/metrics/metrics.h"

namespace keepset::service {

class TableSeries {
 public:
  // `registry` outlives this.
  explicit TableSeries(prometheus::Registry& registry);

  // The series of tables and models that are no longer active go; cells of a grid stay, because
  // their counts would begin anew when the table comes back.
  void SetTables(const std::vector<TableInfoSample>& tables);
  void RecordOperation(const OperationSample& sample);

 private:
  using TableKey = std::array<std::string, 4>;  // model, name, version, digest
  struct TableGauges {
    prometheus::Gauge* info = nullptr;
    prometheus::Gauge* created = nullptr;
  };
  struct ModelCounters {
    absl::flat_hash_map<std::string, prometheus::Counter*> operations;  // by outcome
    prometheus::Counter* input_tokens = nullptr;
    prometheus::Counter* retained_tokens = nullptr;
  };

  ModelCounters AddModel(const std::string& model);
  void RemoveModel(const ModelCounters& counters);
  void SetModels(const std::vector<TableInfoSample>& tables) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void GrowGrid(int64_t num_entropy_bins, int64_t num_ppl_bins)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  prometheus::Family<prometheus::Gauge>& info_;
  prometheus::Family<prometheus::Gauge>& created_;
  prometheus::Family<prometheus::Counter>& model_operations_;
  prometheus::Family<prometheus::Counter>& model_input_tokens_;
  prometheus::Family<prometheus::Counter>& model_retained_tokens_;
  prometheus::Family<prometheus::Counter>& risk_bins_;
  prometheus::Counter& other_cell_;
  const ModelCounters other_model_;

  absl::Mutex mutex_;
  std::map<TableKey, TableGauges> tables_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<std::string, ModelCounters> models_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<std::pair<int64_t, int64_t>, prometheus::Counter*> cells_
      ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_METRICS_TABLE_SERIES_H_
