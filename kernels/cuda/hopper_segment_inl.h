// How the tiles of HopperColumns are counted: through the parts of all units of a launch.
#ifndef KEEPSET_KERNELS_CUDA_HOPPER_SEGMENT_INL_H_
#define KEEPSET_KERNELS_CUDA_HOPPER_SEGMENT_INL_H_

#include <cstdint>

#include "kernels/cuda/hopper_window.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/window_rows_inl.h"

namespace keepset::kernels::cuda {

// Tiles of one part that a block takes one after the other.
struct ColumnSegment {
  UnitOfBlock at;
  HopperPart part;
  int64_t first_task;  // of its first tile
  int first_tile;
  int num_tiles;
};

KEEPSET_HD inline ColumnSegment FindSegment(const HopperParams& p, int64_t task, int64_t end) {
  const WindowParams& window = p.window;
  const int tiles = (window.shape.k.num_tokens + kColumnTokens - 1) / kColumnTokens;
  const int64_t index = p.first_part + task / tiles;
  const auto layer = static_cast<int>(index / p.num_parts);
  const HopperPart part = p.parts[index - static_cast<int64_t>(layer) * p.num_parts];
  const auto first_tile = static_cast<int>(task % tiles);
  const int rest = tiles - first_tile;
  return {FindUnit(window, layer * window.num_units + part.unit - window.first_unit), part, task,
          first_tile, end - task < rest ? static_cast<int>(end - task) : rest};
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_HOPPER_SEGMENT_INL_H_
