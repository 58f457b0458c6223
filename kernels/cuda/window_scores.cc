#include "kernels/cuda/window_scores.h"

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/row_norm_inl.h"

namespace keepset::kernels::cuda {
namespace {

constexpr int kRowWarps = 8;                  // warps of the kernels that take one row per warp
constexpr int64_t kMaxUnitsOfLaunch = 65535;  // a grid dimension of 16 bits

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of either tensor core kernel: one operand stays, two stages of the other pass by.
int64_t MmaSharedBytes(int warps, int padded_dim) {
  const int64_t pitch = MmaTile<DType::kBF16>::PitchBytes(padded_dim);
  const int64_t rows = MmaTile<DType::kBF16>::kRowsPerWarp * warps + 2 * kTileColumns;
  const int64_t row_info = int64_t{2} * kTileColumns * (sizeof(float) + sizeof(int));
  return rows * pitch + row_info;
}

bool SuitsTensorCores(const WindowParams& p) {
  const WindowShape& shape = p.shape;
  if (shape.q_dtype != shape.k.dtype || shape.k.dtype == DType::kF32 || shape.k.head_dim % 8 != 0) {
    return false;
  }
  for (int layer = 0; layer < p.num_layers; ++layer) {
    const int64_t queries = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.layers[layer].q)) |
                            shape.q_head_bytes | shape.q_row_bytes;
    DeviceRows keys = shape.k;
    keys.data = p.layers[layer].k;
    if (queries % 16 != 0 || !HasAlignedRows(keys)) return false;
  }
  return true;
}

int RowTileWarps(const WindowParams& p, const WindowPlan& plan) {
  const int64_t warps = CeilDiv(p.max_unit_rows, MmaTile<DType::kBF16>::kRowsPerWarp);
  return static_cast<int>(std::min<int64_t>(warps, plan.tile_warps));
}

cudaError_t LaunchRowStats(const WindowParams& p, const WindowPlan& plan, int64_t units,
                           cudaStream_t stream) {
  LaunchShape shape;
  shape.grid_x = p.shape.num_chunks;
  shape.grid_z = units;
  if (plan.tile == TileKind::kFma) {
    shape.grid_y = CeilDiv(p.max_unit_rows, FmaTile::kTileRows);
    shape.threads = FmaTile::kThreads;
    shape.shared_bytes = FmaTile::kSharedBytes;
    return Launch<FmaRowStats>(shape, p, stream);
  }
  const int warps = RowTileWarps(p, plan);
  shape.grid_y = CeilDiv(p.max_unit_rows, MmaTile<DType::kBF16>::kRowsPerWarp * warps);
  shape.threads = 32 * warps;
  shape.shared_bytes = MmaSharedBytes(warps, p.shape.padded_dim);
  if (p.shape.k.dtype == DType::kBF16) return Launch<MmaRowStats<DType::kBF16>>(shape, p, stream);
  return Launch<MmaRowStats<DType::kF16>>(shape, p, stream);
}

cudaError_t LaunchColumns(const WindowParams& p, const WindowPlan& plan, int64_t units,
                          cudaStream_t stream) {
  LaunchShape shape;
  shape.grid_y = units;
  if (plan.tile == TileKind::kFma) {
    shape.grid_x = CeilDiv(p.shape.k.num_tokens, FmaTile::kTileRows);
    shape.threads = FmaTile::kThreads;
    shape.shared_bytes =
        FmaTile::kSharedBytes + int64_t{kTileColumns} * (sizeof(float) + sizeof(int));
    return Launch<FmaColumns>(shape, p, stream);
  }
  shape.grid_x =
      CeilDiv(p.shape.k.num_tokens, MmaTile<DType::kBF16>::kRowsPerWarp * plan.tile_warps);
  shape.threads = 32 * plan.tile_warps;
  shape.shared_bytes = MmaSharedBytes(plan.tile_warps, p.shape.padded_dim);
  if (p.shape.k.dtype == DType::kBF16) {
    return Launch<MmaColumns<DType::kBF16>>(shape, p, stream);
  }
  return Launch<MmaColumns<DType::kF16>>(shape, p, stream);
}

}  // namespace

WindowPlan PlanWindow(const WindowParams& params, int64_t max_shared_bytes, int64_t l2_bytes) {
  WindowPlan plan;
  if (SuitsTensorCores(params)) {
    int warps = kMaxTileWarps;
    while (warps > 0 && MmaSharedBytes(warps, params.shape.padded_dim) > max_shared_bytes)
      warps /= 2;
    if (warps > 0) {
      plan.tile = TileKind::kMma;
      plan.tile_warps = warps;
    }
  }
  // Their keys are read twice, the second time from the second-level cache: a share of it.
  const DeviceRows& k = params.shape.k;
  const int64_t head_bytes = int64_t{k.num_tokens} * k.head_dim * DTypeBytes(k.dtype);
  const int64_t all_units = int64_t{params.num_layers} * params.num_units;
  const int64_t most = std::min(all_units, kMaxUnitsOfLaunch);
  plan.units_at_once =
      params.shape.has_lse ? most : std::clamp<int64_t>(l2_bytes * 2 / 5 / head_bytes, 1, most);
  return plan;
}

int64_t PartialBytes(const WindowParams& params, const WindowPlan& plan) {
  const int64_t bytes = plan.units_at_once * params.max_unit_rows * params.shape.num_chunks *
                        params.chunk_parts * int64_t{sizeof(RowStat)};
  return CeilDiv(bytes, 256) * 256;
}

int64_t ReferenceBytes(const WindowParams& params) {
  const int64_t bytes = int64_t{params.num_layers} * params.num_rows * int64_t{sizeof(float)};
  return CeilDiv(bytes, 256) * 256;
}

cudaError_t LaunchWindowScores(WindowParams params, const WindowPlan& plan, cudaStream_t stream) {
  LaunchShape rows;
  rows.grid_x = CeilDiv(params.num_rows, kRowWarps);
  rows.grid_y = params.num_layers;
  rows.threads = 32 * kRowWarps;
  params.first_unit = 0;
  cudaError_t error = Launch<PrepareRows>(rows, params, stream);
  rows.grid_x = CeilDiv(params.max_unit_rows, kRowWarps);
  rows.grid_y = 1;
  const int64_t all_units = int64_t{params.num_layers} * params.num_units;
  for (int64_t unit = 0; unit < all_units && error == cudaSuccess; unit += plan.units_at_once) {
    const int64_t count = std::min(plan.units_at_once, all_units - unit);
    params.first_unit = static_cast<int32_t>(unit);
    if (!params.shape.has_lse) {
      error = LaunchRowStats(params, plan, count, stream);
      if (error != cudaSuccess) break;
      rows.grid_z = count;
      error = Launch<MergeRowStats>(rows, params, stream);
      if (error != cudaSuccess) break;
    }
    error = LaunchColumns(params, plan, count, stream);
  }
  return error;
}

}  // namespace keepset::kernels::cuda
