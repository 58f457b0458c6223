// What the kernels of window_scores.h share: the unit of a block, its rows, and copies of rows into
// shared memory.
#ifndef KEEPSET_KERNELS_CUDA_WINDOW_ROWS_INL_H_
#define KEEPSET_KERNELS_CUDA_WINDOW_ROWS_INL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device_rows.h"
#include "kernels/cuda/element.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/window_scores.h"

namespace keepset::kernels::cuda {

// The unit that a block works on.
struct UnitOfBlock {
  int layer;
  int index;  // among the units of the launch
  WindowUnit unit;
  DeviceRows k;
  const std::byte* keys;  // of the KV head
};

KEEPSET_HD inline UnitOfBlock FindUnit(const WindowParams& p, int block) {
  const int unit = p.first_unit + block;
  const int layer = unit / p.num_units;
  UnitOfBlock at = {layer, block, p.units[unit - layer * p.num_units], p.shape.k, nullptr};
  at.k.data = p.layers[at.layer].k;
  at.k.block_table = p.layers[at.layer].k_table;
  at.keys = at.k.data + at.unit.kv_head * at.k.head_bytes;
  return at;
}

KEEPSET_HD inline const std::byte* QueryRow(const WindowParams& p, int layer, int list_row) {
  const WindowRow row = p.rows[list_row];
  return p.layers[layer].q + row.head * p.shape.q_head_bytes + row.row * p.shape.q_row_bytes;
}

// The last position that a row of the unit sees; -1 for rows past the last.
KEEPSET_HD inline int UnitRowLimit(const WindowParams& p, const WindowUnit& unit, int row) {
  return row < unit.num_rows ? p.rows[unit.first_row + row].limit : -1;
}

// Place of a row of the list in the call's q.
KEEPSET_HD inline int64_t PlaceOfRow(const WindowParams& p, int list_row) {
  const WindowRow row = p.rows[list_row];
  return static_cast<int64_t>(row.head) * p.shape.all_rows + row.row;
}

// Rows into shared memory in pieces of 16 bytes, thread after thread.
class RowCopier {
 public:
  // head_dim: a multiple of 8; padded_dim: of 16.
  template <typename Simt>
  KEEPSET_KERNEL_BODY RowCopier(const Simt& simt, int head_dim, int padded_dim)
      : pieces_(padded_dim / 8),
        used_pieces_(head_dim / 8),
        first_row_(simt.thread() / pieces_),
        first_piece_(simt.thread() - first_row_ * pieces_),
        step_rows_(simt.num_threads() / pieces_),
        step_pieces_(simt.num_threads() - step_rows_ * pieces_) {}

  // row(i) points at row i in global memory, or is null where it is to be zeros. anywhere: readable
  // global memory.
  template <typename Simt, typename RowPointer>
  KEEPSET_KERNEL_BODY void Copy(const Simt& simt, int num_rows, std::byte* to, int pitch,
                                const std::byte* anywhere, RowPointer row) const {
    int i = first_row_;
    int piece = first_piece_;
    while (i < num_rows) {
      const std::byte* from = row(i);
      const bool is_used = from != nullptr && piece < used_pieces_;
      simt.CopyAsync16(to + i * pitch + piece * 16, is_used ? from + piece * 16 : anywhere,
                       is_used);
      i += step_rows_;
      piece += step_pieces_;
      if (piece >= pieces_) {
        piece -= pieces_;
        ++i;
      }
    }
  }

 private:
  int pieces_;
  int used_pieces_;
  int first_row_;
  int first_piece_;
  int step_rows_;
  int step_pieces_;
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_WINDOW_ROWS_INL_H_
