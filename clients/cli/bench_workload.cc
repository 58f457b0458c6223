#include "clients/cli/bench_workload.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"

namespace keepset::cli {
namespace {

constexpr uint64_t kSeed = 42;

// Uniform in (-1, 1), cut to bf16. The multiplier is Knuth's MMIX generator's.
std::vector<uint16_t> RandomBf16(int64_t count, uint64_t stream) {
  uint64_t state = kSeed + stream;
  std::vector<uint16_t> out(count);
  for (uint16_t& value : out) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const float uniform = static_cast<float>(state >> 40) * 0x1p-23f - 1.0f;
    value = static_cast<uint16_t>(std::bit_cast<uint32_t>(uniform) >> 16);
  }
  return out;
}

keepset_kv_view KvView(std::vector<uint16_t>& data, const BenchShape& shape) {
  keepset_kv_view view = {};
  view.data = data.data();
  view.size_bytes = static_cast<int64_t>(data.size() * sizeof(uint16_t));
  view.dtype = KEEPSET_BF16;
  view.num_kv_heads = shape.num_kv_heads;
  view.seq_len = shape.seq_len;
  view.head_dim = shape.head_dim;
  view.head_stride = shape.seq_len * shape.head_dim;
  view.token_stride = shape.head_dim;
  return view;
}

}  // namespace

BenchWorkload::BenchWorkload(const BenchShape& shape)
    : shape_(shape),
      model_json_(absl::StrFormat(
          R"({"architecture":"bench","num_layers":%d,"num_qo_heads":%d,"num_kv_heads":%d,)"
          R"("head_dim":%d,"rope":{"theta":500000.0},"revision":"bench"})",
          shape.num_layers, shape.num_qo_heads, shape.num_kv_heads, shape.head_dim)),
      q_(RandomBf16(shape.num_qo_heads * shape.window * shape.head_dim, 1)),
      k_(RandomBf16(shape.num_kv_heads * shape.seq_len * shape.head_dim, 2)),
      v_(RandomBf16(shape.num_kv_heads * shape.seq_len * shape.head_dim, 3)) {
  observation_.struct_size = sizeof(observation_);
  keepset_rows_view& q = observation_.q_window;
  q.data = q_.data();
  q.size_bytes = static_cast<int64_t>(q_.size() * sizeof(uint16_t));
  q.dtype = KEEPSET_BF16;
  q.num_qo_heads = shape.num_qo_heads;
  q.num_rows = shape.window;
  q.last_dim = shape.head_dim;
  q.head_stride = shape.window * shape.head_dim;
  q.row_stride = shape.head_dim;
  observation_.k = KvView(k_, shape);
  observation_.v = KvView(v_, shape);
}

keepset_operation_spec BenchWorkload::Spec() const {
  keepset_operation_spec spec = {};
  spec.struct_size = sizeof(spec);
  spec.model_json = model_json_.c_str();
  spec.seq_len = shape_.seq_len;
  spec.num_rows = shape_.window;
  spec.softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  spec.kv_dtype = KEEPSET_BF16;
  spec.ppl = std::nan("");
  return spec;
}

absl::StatusOr<TimedOperation> TimeInProcess(keepset_engine* engine,
                                             const keepset_operation_spec& spec,
                                             const BenchWorkload& workload) {
  const absl::Time start = absl::Now();
  keepset_operation* begun = nullptr;
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_operation_begin(engine, &spec, &begun)));
  const OperationHandle operation(begun);
  for (int64_t layer = 0; layer < workload.shape().num_layers; ++layer) {
    KEEPSET_RETURN_IF_ERROR(
        FromEngine(keepset_operation_observe(operation.get(), layer, &workload.observation())));
  }
  const keepset_result* result = nullptr;
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_operation_finish(operation.get(), &result)));
  TimedOperation out;
  out.total_seconds = absl::ToDoubleSeconds(absl::Now() - start);
  out.score_seconds = keepset_result_stage_seconds(result, "score");
  out.select_seconds = keepset_result_stage_seconds(result, "select");
  out.outcome = keepset_result_outcome(result);
  return out;
}

double Quantile(std::vector<double> samples, double p) {
  std::sort(samples.begin(), samples.end());
  const auto rank = static_cast<size_t>(std::ceil(p * static_cast<double>(samples.size())));
  return samples[std::clamp<size_t>(rank, 1, samples.size()) - 1];
}

}  // namespace keepset::cli
