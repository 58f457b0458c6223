#include "kernels/cuda/cublas_window.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/launch.h"

namespace keepset::kernels::cuda {
namespace {

constexpr int64_t kPieceLogits = kPieceBytes / int64_t{sizeof(float)};
constexpr int64_t kFewTokens = 512;  // of a piece, where rows and head_dim allow
constexpr int64_t kTokenStep = 8;
constexpr int kMostOutputBlocks = 64;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t Aligned(int64_t bytes) { return CeilDiv(bytes, 256) * 256; }

int64_t KeyRowBytes(const CublasPlan& plan) { return plan.padded_dim * DTypeBytes(plan.dtype); }

// Whether a matrix of cuBLAS describes the keys of a KV head.
bool LieAsMatrix(const WindowParams& params, DType dtype) {
  const DeviceRows& k = params.shape.k;
  const int64_t pitch = k.token_bytes / DTypeBytes(k.dtype);
  return k.dtype == dtype && params.layers[0].k_table == nullptr && pitch >= k.head_dim &&
         pitch <= std::numeric_limits<int32_t>::max();
}

// Parts of the workspace.
struct Parts {
  int64_t references = 0;
  int64_t stats = 0;
  int64_t queries = 0;
  int64_t keys = 0;
  int64_t logits = 0;
  int64_t products = 0;
  int64_t end = 0;
};

Parts PartsOf(const WindowParams& params, const CublasPlan& plan) {
  const int64_t unit_rows = int64_t{plan.units_at_once} * params.max_unit_rows;
  Parts parts;
  parts.stats = parts.references + ReferenceBytes(params);
  parts.queries =
      parts.stats + (params.shape.has_lse ? 0 : Aligned(unit_rows * int64_t{sizeof(RowStat)}));
  parts.keys = parts.queries + Aligned(unit_rows * KeyRowBytes(plan));
  const int64_t key_rows =
      plan.keys == KeySource::kCopied ? int64_t{plan.units_at_once} * plan.tokens_at_once : 0;
  parts.logits = parts.keys + Aligned(key_rows * KeyRowBytes(plan));
  parts.products = parts.logits + Aligned(int64_t{plan.units_at_once} * plan.rows_at_once *
                                          plan.tokens_at_once * int64_t{sizeof(float)});
  parts.end = parts.products + kCublasWorkspaceBytes;
  return parts;
}

// Units whose KV heads follow each other, which one batch takes where the keys lie.
struct Run {
  int64_t first = 0;  // unit of the layer
  int64_t count = 0;
};

// Queues a call, group of units after group of units.
class Call {
 public:
  Call(const WindowParams& params, const CublasPlan& plan, absl::Span<const WindowUnit> units,
       std::byte* workspace, LogitProducts& products, DeviceHealth& health, cudaStream_t stream)
      : plan_(plan), units_(units), products_(products), health_(health), stream_(stream) {
    const Parts parts = PartsOf(params, plan);
    params_.window = params;
    params_.window.references = reinterpret_cast<float*>(workspace + parts.references);
    params_.window.partial = reinterpret_cast<RowStat*>(workspace + parts.stats);
    params_.window.shape.num_chunks = 1;
    params_.window.chunk_parts = 1;
    params_.queries = workspace + parts.queries;
    params_.keys = workspace + parts.keys;
    params_.logits = reinterpret_cast<float*>(workspace + parts.logits);
    params_.dtype = plan.dtype;
    params_.padded_dim = plan.padded_dim;
    params_.rows_at_once = plan.rows_at_once;
    params_.tokens_at_once = plan.tokens_at_once;
    products_workspace_ = workspace + parts.products;
  }

  absl::Status Queue() {
    params_.window.first_unit = 0;
    KEEPSET_RETURN_IF_ERROR(LaunchRows<PrepareRows>(params_.window.num_rows,
                                                    params_.window.num_layers, params_.window));
    for (int layer = 0; layer < params_.window.num_layers; ++layer) {
      for (int64_t unit = 0; unit < params_.window.num_units; unit += plan_.units_at_once) {
        layer_ = layer;
        group_.first = unit;
        group_.count = std::min<int64_t>(plan_.units_at_once, params_.window.num_units - unit);
        KEEPSET_RETURN_IF_ERROR(QueueGroup());
      }
    }
    return absl::OkStatus();
  }

 private:
  enum class Sweep { kStats, kColumns };

  absl::Status QueueGroup() {
    const WindowParams& window = params_.window;
    params_.window.first_unit = static_cast<int32_t>(layer_ * window.num_units + group_.first);
    KEEPSET_RETURN_IF_ERROR(LaunchRows<PackQueries>(window.max_unit_rows, group_.count, params_));
    has_logits_ = false;
    if (!window.shape.has_lse) {
      KEEPSET_RETURN_IF_ERROR(QueueSweep(Sweep::kStats));
      LaunchShape shape;
      shape.threads = 32 * kPieceRowWarps;
      shape.grid_x = CeilDiv(window.max_unit_rows, kPieceRowWarps);
      shape.grid_z = group_.count;
      KEEPSET_RETURN_IF_ERROR(Check(Launch<MergeRowStats>(shape, window, stream_)));
      has_logits_ = window.shape.k.num_tokens <= plan_.tokens_at_once &&
                    window.max_unit_rows <= plan_.rows_at_once;
    }
    return QueueSweep(Sweep::kColumns);
  }

  absl::Status QueueSweep(Sweep sweep) {
    const int32_t tokens = params_.window.shape.k.num_tokens;
    for (int32_t token = 0; token < tokens; token += plan_.tokens_at_once) {
      params_.first_token = token;
      params_.num_tokens = std::min(plan_.tokens_at_once, tokens - token);
      if (plan_.keys == KeySource::kCopied && !has_logits_) {
        KEEPSET_RETURN_IF_ERROR(LaunchRows<PackKeys>(params_.num_tokens, group_.count, params_));
      }
      for (int32_t row = 0; row < params_.window.max_unit_rows; row += plan_.rows_at_once) {
        params_.first_row = row;
        params_.num_rows = std::min(plan_.rows_at_once, params_.window.max_unit_rows - row);
        if (!has_logits_) KEEPSET_RETURN_IF_ERROR(QueueProducts());
        KEEPSET_RETURN_IF_ERROR(
            sweep == Sweep::kStats ? LaunchRows<PieceStats>(params_.num_rows, group_.count, params_)
                                   : LaunchColumns());
      }
    }
    return absl::OkStatus();
  }

  absl::Status QueueProducts() {
    const DeviceRows& k = params_.window.shape.k;
    const int64_t element = DTypeBytes(plan_.dtype);
    LogitGemm gemm;
    gemm.dtype = plan_.dtype;
    gemm.query_pitch = plan_.padded_dim;
    gemm.query_stride = int64_t{params_.window.max_unit_rows} * plan_.padded_dim;
    gemm.logit_pitch = plan_.tokens_at_once;
    gemm.logit_stride = int64_t{plan_.rows_at_once} * plan_.tokens_at_once;
    gemm.num_tokens = params_.num_tokens;
    gemm.num_rows = params_.num_rows;
    const bool is_copied = plan_.keys == KeySource::kCopied;
    gemm.head_dim = is_copied ? plan_.padded_dim : k.head_dim;
    gemm.key_pitch = is_copied ? plan_.padded_dim : k.token_bytes / element;
    gemm.key_stride =
        is_copied ? int64_t{plan_.tokens_at_once} * plan_.padded_dim : k.head_bytes / element;
    Run run = group_;
    while (run.first < group_.first + group_.count) {
      if (!is_copied) run = NextRun(run.first);
      const int64_t in_group = run.first - group_.first;
      gemm.batch = run.count;
      gemm.queries =
          params_.queries +
          (in_group * gemm.query_stride + params_.first_row * gemm.query_pitch) * element;
      gemm.logits = params_.logits + in_group * gemm.logit_stride;
      gemm.keys = is_copied
                      ? params_.keys
                      : params_.window.layers[layer_].k + units_[run.first].kv_head * k.head_bytes +
                            params_.first_token * k.token_bytes;
      KEEPSET_RETURN_IF_ERROR(products_.Queue(gemm, products_workspace_, stream_));
      run.first += run.count;
    }
    return absl::OkStatus();
  }

  Run NextRun(int64_t first) const {
    const int64_t end = group_.first + group_.count;
    Run run = {first, 1};
    while (first + run.count < end &&
           units_[first + run.count].kv_head == units_[first].kv_head + run.count) {
      ++run.count;
    }
    return run;
  }

  absl::Status LaunchColumns() {
    int32_t outputs = 1;
    for (int64_t unit = group_.first; unit < group_.first + group_.count; ++unit) {
      outputs = std::max(outputs, units_[unit].num_outputs);
    }
    LaunchShape shape;
    shape.threads = kPieceTokens;
    shape.grid_x = CeilDiv(params_.num_tokens, kPieceTokens);
    shape.grid_y = std::min(outputs, kMostOutputBlocks);
    shape.grid_z = group_.count;
    return Check(Launch<PieceColumns>(shape, params_, stream_));
  }

  template <typename Kernel>
  absl::Status LaunchRows(int64_t rows, int64_t units, const typename Kernel::Params& params) {
    LaunchShape shape;
    shape.threads = 32 * kPieceRowWarps;
    shape.grid_x = CeilDiv(rows, kPieceRowWarps);
    shape.grid_y = units;
    return Check(Launch<Kernel>(shape, params, stream_));
  }

  absl::Status Check(cudaError_t error) { return health_.Check(error, "window scores"); }

  const CublasPlan& plan_;
  const absl::Span<const WindowUnit> units_;
  LogitProducts& products_;
  DeviceHealth& health_;
  const cudaStream_t stream_;
  CublasParams params_;
  std::byte* products_workspace_ = nullptr;
  int layer_ = 0;
  Run group_;
  bool has_logits_ = false;  // of the whole group, from its first sweep
};

}  // namespace

absl::StatusOr<CublasPlan> PlanCublas(const WindowParams& params, absl::string_view what) {
  const DeviceRows& k = params.shape.k;
  CublasPlan plan;
  plan.dtype = params.shape.q_dtype == k.dtype ? k.dtype : DType::kF32;
  plan.keys = LieAsMatrix(params, plan.dtype) ? KeySource::kWhereTheyLie : KeySource::kCopied;
  plan.padded_dim = static_cast<int32_t>(CeilDiv(k.head_dim, kTokenStep) * kTokenStep);
  const bool is_copied = plan.keys == KeySource::kCopied;
  // Of one unit.
  const int64_t most_keys = is_copied ? kPieceBytes / KeyRowBytes(plan) : kPieceLogits;
  if (most_keys < kTokenStep) {
    return absl::InvalidArgumentError(absl::StrCat(
        what, ": k: head_dim=", k.head_dim, ", want at most ",
        kPieceBytes / kTokenStep / DTypeBytes(plan.dtype),
        " with window_kernels=\"cublas\" where keys are copied (pages, or another type than q)"));
  }
  const int64_t rows = std::min<int64_t>(params.max_unit_rows, kPieceLogits / kFewTokens);
  const int64_t units = std::clamp<int64_t>(
      std::min(kPieceLogits / (kFewTokens * rows), most_keys / kFewTokens), 1, params.num_units);
  int64_t tokens = std::min(kPieceLogits / (units * rows), most_keys / units);
  tokens = tokens / (tokens < kFewTokens ? kTokenStep : kFewTokens) *
           (tokens < kFewTokens ? kTokenStep : kFewTokens);
  plan.units_at_once = static_cast<int32_t>(units);
  plan.rows_at_once = static_cast<int32_t>(rows);
  plan.tokens_at_once =
      static_cast<int32_t>(std::min(tokens, CeilDiv(k.num_tokens, kTokenStep) * kTokenStep));
  return plan;
}

int64_t CublasWorkspaceBytes(const WindowParams& params, const CublasPlan& plan) {
  return PartsOf(params, plan).end;
}

absl::Status QueueCublasWindowScores(const WindowParams& params, const CublasPlan& plan,
                                     absl::Span<const WindowUnit> units, std::byte* workspace,
                                     LogitProducts& products, DeviceHealth& health,
                                     cudaStream_t stream) {
  return Call(params, plan, units, workspace, products, health, stream).Queue();
}

}  // namespace keepset::kernels::cuda
