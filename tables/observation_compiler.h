// From observation records to an observation_heads table: pooling, dilation, heads, rows and
// weights by cross-validated recall of the needed mass (docs/observation-heads.md).
#ifndef KEEPSET_TABLES_OBSERVATION_COMPILER_H_
#define KEEPSET_TABLES_OBSERVATION_COMPILER_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "tables/observation_heads_table.h"

namespace keepset::tables {

struct ObservationCompileOptions {
  std::string name;
  std::string version;
  std::vector<int64_t> budgets;  // recall is averaged over them; the table lists them
  std::vector<int64_t> pool_kernels = {1, 5};
  std::vector<int64_t> dilations = {0, 4, 12};
  ObservationNormalization normalization = ObservationNormalization::kMax;
  int64_t max_heads = 16;
  // Exactly so many observations instead of the validated number; 0: validated.
  int64_t num_heads = 0;
  int64_t num_folds = 4;
  std::optional<int64_t> default_budget;
  int num_threads = 0;  // 0: all cores this process may use
  absl::Time created;
  std::string tool_version;
};

struct CompiledObservationHeads {
  ObservationHeadsContent content;
  std::string report_json;  // docs/observation-heads.md names its fields
};

// Steps done and steps of all; a step is one fold of one way to pool and dilate.
using CompileProgress = std::function<void(int64_t done, int64_t total)>;

// The content depends on the records as a set: neither their order nor the number of threads
// changes a bit of it. InvalidArgument: records of two models or candidate lists, one prompt twice,
// no needed mass, or nothing that observes it.
absl::StatusOr<CompiledObservationHeads> CompileObservationHeads(
    const std::vector<std::string>& record_paths, const ObservationCompileOptions& options,
    const CompileProgress& progress);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_OBSERVATION_COMPILER_H_
