#include "kernels/cuda/window_scores.h"

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/row_norm_inl.h"

namespace keepset::kernels::cuda {
namespace {

constexpr int kRowWarps = 8;  // warps of the kernels that take one row per warp

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t RowsPerKvHead(const WindowParams& p) { return int64_t{p.group} * p.num_rows; }

// Of either tensor core kernel: one operand stays, two stages of the other pass by.
int64_t MmaSharedBytes(int warps, int padded_dim) {
  const int64_t pitch = MmaTile<DType::kBF16>::PitchBytes(padded_dim);
  const int64_t rows = MmaTile<DType::kBF16>::kRowsPerWarp * warps + 2 * kTileColumns;
  const int64_t row_info = int64_t{2} * kTileColumns * (sizeof(float) + sizeof(int));
  return rows * pitch + row_info;
}

bool SuitsTensorCores(const WindowParams& p) {
  if (p.q_dtype != p.k.dtype || p.k.dtype == DType::kF32 || p.k.head_dim % 8 != 0) return false;
  const int64_t queries =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.q)) | p.q_head_bytes | p.q_row_bytes;
  return queries % 16 == 0 && HasAlignedRows(p.k);
}

int RowTileWarps(const WindowParams& p, const WindowPlan& plan) {
  const int64_t warps = CeilDiv(RowsPerKvHead(p), MmaTile<DType::kBF16>::kRowsPerWarp);
  return static_cast<int>(std::min<int64_t>(warps, plan.tile_warps));
}

cudaError_t LaunchRowStats(const WindowParams& p, const WindowPlan& plan, int64_t kv_heads,
                           cudaStream_t stream) {
  LaunchShape shape;
  shape.grid_x = p.num_chunks;
  shape.grid_z = kv_heads;
  if (plan.tile == TileKind::kFma) {
    shape.grid_y = CeilDiv(RowsPerKvHead(p), FmaTile::kTileRows);
    shape.threads = FmaTile::kThreads;
    shape.shared_bytes = FmaTile::kSharedBytes;
    return Launch<FmaRowStats>(shape, p, stream);
  }
  const int warps = RowTileWarps(p, plan);
  shape.grid_y = CeilDiv(RowsPerKvHead(p), MmaTile<DType::kBF16>::kRowsPerWarp * warps);
  shape.threads = 32 * warps;
  shape.shared_bytes = MmaSharedBytes(warps, p.padded_dim);
  if (p.k.dtype == DType::kBF16) return Launch<MmaRowStats<DType::kBF16>>(shape, p, stream);
  return Launch<MmaRowStats<DType::kF16>>(shape, p, stream);
}

template <ColumnReduction kReduction>
cudaError_t LaunchColumns(const WindowParams& p, const WindowPlan& plan, int64_t kv_heads,
                          cudaStream_t stream) {
  LaunchShape shape;
  shape.grid_y = kv_heads;
  if (plan.tile == TileKind::kFma) {
    shape.grid_x = CeilDiv(p.k.num_tokens, FmaTile::kTileRows);
    shape.threads = FmaTile::kThreads;
    shape.shared_bytes =
        FmaTile::kSharedBytes + int64_t{kTileColumns} * (sizeof(float) + sizeof(int));
    return Launch<FmaColumns<kReduction>>(shape, p, stream);
  }
  shape.grid_x = CeilDiv(p.k.num_tokens, MmaTile<DType::kBF16>::kRowsPerWarp * plan.tile_warps);
  shape.threads = 32 * plan.tile_warps;
  shape.shared_bytes = MmaSharedBytes(plan.tile_warps, p.padded_dim);
  if (p.k.dtype == DType::kBF16) {
    return Launch<MmaColumns<DType::kBF16, kReduction>>(shape, p, stream);
  }
  return Launch<MmaColumns<DType::kF16, kReduction>>(shape, p, stream);
}

}  // namespace

WindowPlan PlanWindow(const WindowParams& params, int64_t max_shared_bytes, int64_t l2_bytes) {
  WindowPlan plan;
  if (SuitsTensorCores(params)) {
    int warps = kMaxTileWarps;
    while (warps > 0 && MmaSharedBytes(warps, params.padded_dim) > max_shared_bytes) warps /= 2;
    if (warps > 0) {
      plan.tile = TileKind::kMma;
      plan.tile_warps = warps;
    }
  }
  // Their keys are read twice, the second time from the second-level cache: a share of it.
  const int64_t head_bytes =
      int64_t{params.k.num_tokens} * params.k.head_dim * DTypeBytes(params.k.dtype);
  plan.kv_heads_at_once = std::clamp<int64_t>(l2_bytes * 2 / 5 / head_bytes, 1, params.k.num_heads);
  return plan;
}

int64_t PartialBytes(const WindowParams& params, const WindowPlan& plan) {
  const int64_t bytes =
      plan.kv_heads_at_once * RowsPerKvHead(params) * params.num_chunks * int64_t{sizeof(RowStat)};
  return CeilDiv(bytes, 256) * 256;
}

int64_t ReferenceBytes(const WindowParams& params) {
  const int64_t bytes = params.k.num_heads * RowsPerKvHead(params) * int64_t{sizeof(float)};
  return CeilDiv(bytes, 256) * 256;
}

cudaError_t LaunchWindowScores(WindowParams params, const WindowPlan& plan,
                               ColumnReduction reduction, cudaStream_t stream) {
  LaunchShape rows;
  rows.grid_x = CeilDiv(params.k.num_heads * RowsPerKvHead(params), kRowWarps);
  rows.threads = 32 * kRowWarps;
  params.first_kv_head = 0;
  cudaError_t error = Launch<PrepareRows>(rows, params, stream);
  const int64_t step = params.lse != nullptr ? params.k.num_heads : plan.kv_heads_at_once;
  for (int64_t head = 0; head < params.k.num_heads && error == cudaSuccess; head += step) {
    const int64_t count = std::min<int64_t>(step, params.k.num_heads - head);
    params.first_kv_head = static_cast<int32_t>(head);
    if (params.lse == nullptr) {
      error = LaunchRowStats(params, plan, count, stream);
      if (error != cudaSuccess) break;
      rows.grid_x = CeilDiv(RowsPerKvHead(params), kRowWarps);
      rows.grid_z = count;
      error = Launch<MergeRowStats>(rows, params, stream);
      if (error != cudaSuccess) break;
    }
    error = reduction == ColumnReduction::kMax
                ? LaunchColumns<ColumnReduction::kMax>(params, plan, count, stream)
                : LaunchColumns<ColumnReduction::kSum>(params, plan, count, stream);
  }
  return error;
}

}  // namespace keepset::kernels::cuda
