// Made-up tensors of a model's shape for timing: one layer that stands for all of them, so that
// memory does not grow with the number of layers.
#ifndef KEEPSET_CLIENTS_CLI_BENCH_WORKLOAD_H_
#define KEEPSET_CLIENTS_CLI_BENCH_WORKLOAD_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "clients/cli/engine_handles.h"
#include "engine/keepset.h"

namespace keepset::cli {

// Llama-3-8B by default.
struct BenchShape {
  int64_t num_layers = 32;
  int64_t num_qo_heads = 32;
  int64_t num_kv_heads = 8;
  int64_t head_dim = 128;
  int64_t window = 64;  // W observed rows
  int64_t seq_len = 0;  // T
};

class BenchWorkload {
 public:
  // bf16 values from a fixed seed.
  explicit BenchWorkload(const BenchShape& shape);
  BenchWorkload(const BenchWorkload&) = delete;
  BenchWorkload& operator=(const BenchWorkload&) = delete;

  const BenchShape& shape() const { return shape_; }
  const std::string& model_json() const { return model_json_; }
  // Views of the one layer.
  const keepset_layer_observation& observation() const { return observation_; }
  // Policy and budget are the caller's to set; strings belong to the workload.
  keepset_operation_spec Spec() const;

 private:
  const BenchShape shape_;
  std::string model_json_;
  std::vector<uint16_t> q_;  // [num_qo_heads, window, head_dim]
  std::vector<uint16_t> k_;  // [num_kv_heads, seq_len, head_dim]
  std::vector<uint16_t> v_;  // [num_kv_heads, seq_len, head_dim]
  keepset_layer_observation observation_ = {};
};

// One operation from begin to finish, every layer the workload's one.
struct TimedOperation {
  double total_seconds = 0.0;
  double score_seconds = 0.0;
  double select_seconds = 0.0;
  std::string outcome;  // "compressed", "kept_full"
};
absl::StatusOr<TimedOperation> TimeInProcess(keepset_engine* engine,
                                             const keepset_operation_spec& spec,
                                             const BenchWorkload& workload);

// The p-quantile (nearest rank) of `samples`, which must not be empty.
double Quantile(std::vector<double> samples, double p);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_BENCH_WORKLOAD_H_
