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

// Rows that a thread of GatherKernel has on their way.
constexpr int kGatherRows = 4;

struct alignas(8) HalfPiece {
  uint32_t words[2];
};

// The rows of one set that a block copies, `lanes` neighbouring threads a row. A thread has
// kGatherRows rows on their way: first their positions, then their bytes.
template <typename Unit, typename Simt>
KEEPSET_KERNEL_BODY inline void CopyRows(const Simt& simt, const GatherTensor& p, int head,
                                         const int32_t* indices, int count, int lanes) {
  const int units = p.row_bytes / static_cast<int>(sizeof(Unit));
  const int lane = simt.thread() & (lanes - 1);
  const int rows_per_block = simt.num_threads() / lanes;
  const int stride = simt.grid_x() * rows_per_block;
  for (int first = simt.block_x() * rows_per_block + simt.thread() / lanes; first < count;
       first += stride * kGatherRows) {
    int32_t positions[kGatherRows];
    KEEPSET_UNROLL
    for (int r = 0; r < kGatherRows; ++r) {
      const int i = first + r * stride;
      positions[r] = i < count ? indices[i] : -1;
    }
    const Unit* from[kGatherRows];
    KEEPSET_UNROLL
    for (int r = 0; r < kGatherRows; ++r) {
      from[r] =
          positions[r] < 0 ? nullptr : reinterpret_cast<const Unit*>(p.in.Row(head, positions[r]));
    }
    Unit* to[kGatherRows];
    KEEPSET_UNROLL
    for (int r = 0; r < kGatherRows; ++r) {
      to[r] = from[r] == nullptr ? nullptr
                                 : reinterpret_cast<Unit*>(p.out.Row(head, first + r * stride));
    }
    for (int unit = lane; unit < units; unit += lanes) {
      Unit values[kGatherRows];
      KEEPSET_UNROLL
      for (int r = 0; r < kGatherRows; ++r) {
        if (from[r] != nullptr) values[r] = simt.LoadOnce(from[r] + unit);
      }
      KEEPSET_UNROLL
      for (int r = 0; r < kGatherRows; ++r) {
        if (from[r] != nullptr) simt.StoreGlobal(to[r] + unit, values[r]);
      }
    }
  }
}

template <typename Simt>
KEEPSET_KERNEL_BODY void GatherKernel::Run(const Simt& simt, const Params& params) {
  const GatherTensor p = params.tensors[simt.block_z()];
  const int head = simt.block_y();
  if (head >= p.in.num_heads) return;
  const int set = p.num_sets == 1 ? 0 : head;
  const int first = p.offsets[set];
  const int count = p.offsets[set + 1] - first;
  const int32_t* const indices = p.indices + first;
  // Short rows are shared by a part of a warp.
  const int units = p.row_bytes / p.unit_bytes;
  int lanes = 1;
  while (lanes < units && lanes < 32) lanes *= 2;
  switch (p.unit_bytes) {
    case 16:
      CopyRows<Piece>(simt, p, head, indices, count, lanes);
      break;
    case 8:
      CopyRows<HalfPiece>(simt, p, head, indices, count, lanes);
      break;
    case 4:
      CopyRows<uint32_t>(simt, p, head, indices, count, lanes);
      break;
    default:
      CopyRows<uint16_t>(simt, p, head, indices, count, lanes);
      break;
  }
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_ROW_OPS_KERNEL_H_
