// Bodies of the kernels of row_ops.h.
#ifndef KEEPSET_KERNELS_CUDA_ROW_OPS_KERNEL_H_
#define KEEPSET_KERNELS_CUDA_ROW_OPS_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/fault_code.h"
#include "kernels/cuda/row_norm_inl.h"
#include "kernels/cuda/row_ops.h"

namespace keepset::kernels::cuda {

template <typename Simt>
KEEPSET_KERNEL_BODY void RowNormsKernel::Run(const Simt& simt, const Params& p) {
  const int begin = (simt.block_x() * simt.num_warps() + simt.warp()) * kRowsPerWarp;
  const int head = simt.block_y();
  const int left = p.rows.num_tokens - begin;
  if (left <= 0) return;
  const int64_t first_place = static_cast<int64_t>(head) * p.rows.num_tokens + begin;
  WarpRowNorms(simt, p.rows, head, begin, left < kRowsPerWarp ? left : kRowsPerWarp, first_place,
               p.out + first_place, p.fault);
}

template <typename Simt>
KEEPSET_KERNEL_BODY void TileColumnsKernel::Run(const Simt& simt, const Params& p) {
  const int t = simt.block_x() * simt.num_threads() + simt.thread();
  if (t >= p.seq_len) return;
  const TileOutput output = p.outputs[simt.block_y()];
  const std::byte* column = p.tile + output.head * p.head_bytes;
  float value = 0.0f;
  bool is_bad = false;
  for (int i = output.first_row; i < output.first_row + output.num_rows; ++i) {
    if (t > p.row_limits[i]) continue;
    const float x = LoadElement(column + i * p.row_bytes, t, p.dtype);
    // NaN is not >= 0.
    if (!(x >= 0.0f) || !IsFiniteValue(x)) {
      is_bad = true;
      const int64_t row = static_cast<int64_t>(output.head) * p.all_rows + i;
      simt.MinGlobal(p.fault, FaultCode(FaultKind::kTileValue, row * p.seq_len + t));
      break;
    }
    value = output.reduction == RowReduction::kMax ? simt.Max(value, x) : simt.Add(value, x);
  }
  if (!is_bad && !IsFiniteValue(value)) {
    simt.MinGlobal(p.fault, FaultCode(FaultKind::kTileSum, output.head));
  }
  if (output.reduction == RowReduction::kMean) {
    value = simt.Div(value, output.divisor);
  }
  p.out[static_cast<int64_t>(simt.block_y()) * p.seq_len + t] = value;
}

template <typename Unit>
KEEPSET_HD inline void CopyRow(std::byte* to, const std::byte* from, int row_bytes, int lane,
                               int lanes) {
  auto* to_units = reinterpret_cast<Unit*>(to);
  const auto* from_units = reinterpret_cast<const Unit*>(from);
  const int units = row_bytes / static_cast<int>(sizeof(Unit));
  for (int i = lane; i < units; i += lanes) to_units[i] = from_units[i];
}

struct alignas(8) HalfPiece {
  uint32_t words[2];
};

template <typename Simt>
KEEPSET_KERNEL_BODY void GatherKernel::Run(const Simt& simt, const Params& params) {
  const GatherTensor& p = params.tensors[simt.block_z()];
  const int head = simt.block_y();
  if (head >= p.in.num_heads) return;
  const int set = p.num_sets == 1 ? 0 : head;
  const int first = p.offsets[set];
  const int count = p.offsets[set + 1] - first;
  // Short rows are shared by a part of a warp.
  const int units = p.row_bytes / p.unit_bytes;
  int lanes = 1;
  while (lanes < units && lanes < 32) lanes *= 2;
  const int rows_per_block = simt.num_threads() / lanes;
  const int lane = simt.thread() & (lanes - 1);
  const int place = simt.thread() / lanes;
  for (int i = simt.block_x() * rows_per_block + place; i < count;
       i += simt.grid_x() * rows_per_block) {
    const std::byte* from = p.in.Row(head, p.indices[first + i]);
    std::byte* to = p.out.Row(head, i);
    switch (p.unit_bytes) {
      case 16:
        CopyRow<Piece>(to, from, p.row_bytes, lane, lanes);
        break;
      case 8:
        CopyRow<HalfPiece>(to, from, p.row_bytes, lane, lanes);
        break;
      case 4:
        CopyRow<uint32_t>(to, from, p.row_bytes, lane, lanes);
        break;
      default:
        CopyRow<uint16_t>(to, from, p.row_bytes, lane, lanes);
        break;
    }
  }
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_ROW_OPS_KERNEL_H_
