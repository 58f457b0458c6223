// Bodies of the kernels of window_scores.h that find the log-sum-exp of every row.
#ifndef KEEPSET_KERNELS_CUDA_ROW_STATS_KERNEL_H_
#define KEEPSET_KERNELS_CUDA_ROW_STATS_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/fault_code.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/logit_tiles.h"
#include "kernels/cuda/row_stat_inl.h"
#include "kernels/cuda/window_rows_inl.h"
#include "kernels/cuda/window_scores.h"

namespace keepset::kernels::cuda {

// Where the statistics of a row of the block's unit go.
template <typename Simt>
KEEPSET_KERNEL_BODY inline RowStat* PlaceOfStat(const Simt& simt, const WindowParams& p, int row) {
  const int64_t place = static_cast<int64_t>(simt.block_z()) * p.max_unit_rows + row;
  return p.partial + place * p.shape.num_chunks + simt.block_x();
}

template <typename Simt>
KEEPSET_KERNEL_BODY void PrepareRows::Run(const Simt& simt, const Params& p) {
  const int list_row = simt.block_x() * simt.num_warps() + simt.warp();
  if (list_row >= p.num_rows) return;
  const int layer_index = simt.block_y();
  const WindowLayer& layer = p.layers[layer_index];
  const std::byte* q = QueryRow(p, layer_index, list_row);
  bool is_finite = true;
  for (int channel = simt.lane(); channel < p.shape.k.head_dim; channel += 32) {
    is_finite = is_finite && IsFiniteValue(LoadElement(q, channel, p.shape.q_dtype));
  }
  const int64_t place = PlaceOfRow(p, list_row);
  if (!is_finite) simt.MinGlobal(layer.fault, FaultCode(FaultKind::kQuery, place));
  if (layer.lse == nullptr || simt.lane() != 0) return;
  constexpr double kLog2E = 1.4426950408889634;
  const WindowRow row = p.rows[list_row];
  const float lse =
      LoadElement(layer.lse + row.head * p.shape.lse_head_bytes, row.row, p.shape.lse_dtype);
  const double log2_per_unit = p.shape.lse_base == LogBase::kTwo ? 1.0 : kLog2E;
  const auto reference = static_cast<float>(lse * log2_per_unit);
  if (!IsFiniteValue(reference)) simt.MinGlobal(layer.fault, FaultCode(FaultKind::kLse, place));
  p.references[static_cast<int64_t>(layer_index) * p.num_rows + list_row] = reference;
}

static_assert(kChunkTokens % (2 * kTileColumns) == 0);

template <DType kType>
template <typename Simt>
KEEPSET_KERNEL_BODY void MmaRowStats<kType>::Run(const Simt& simt, const Params& p) {
  using Tile = MmaTile<kType>;
  const UnitOfBlock at = FindUnit(p, simt.block_z());
  const int pitch = Tile::PitchBytes(p.shape.padded_dim);
  const int tile_rows = Tile::kRowsPerWarp * simt.num_warps();
  const int first_row = simt.block_y() * tile_rows;
  if (first_row >= at.unit.num_rows) return;
  std::byte* q_rows = simt.shared();
  std::byte* k_rows = q_rows + tile_rows * pitch;  // two stages of kTileColumns rows

  const RowCopier copier(simt, at.k.head_dim, p.shape.padded_dim);
  copier.Copy(simt, tile_rows, q_rows, pitch, p.layers[at.layer].q, [&](int i) -> const std::byte* {
    return first_row + i < at.unit.num_rows
               ? QueryRow(p, at.layer, at.unit.first_row + first_row + i)
               : nullptr;
  });
  simt.CommitCopies();

  // Registers are scarce here: what can be had from `begin` or the parameters is not kept.
  const int chunk_begin = simt.block_x() * kChunkTokens;
  const auto load_keys = [&](int begin, int stage) {
    copier.Copy(simt, kTileColumns, k_rows + stage * kTileColumns * pitch, pitch, at.keys,
                [&](int i) -> const std::byte* {
                  return begin + i < at.k.num_tokens ? at.keys + at.k.TokenOffset(begin + i)
                                                     : nullptr;
                });
    simt.CommitCopies();
  };
  load_keys(chunk_begin, 0);

  const int rows_left = at.unit.num_rows - first_row;
  const int first_list_row = at.unit.first_row + first_row;
  const auto limit = [&](int r) {
    const int row = Tile::Row(simt.thread(), r);
    return row < rows_left ? p.rows[first_list_row + row].limit : -1;
  };
  RowStat stats[Tile::kRows];
  KEEPSET_UNROLL
  for (int r = 0; r < Tile::kRows; ++r) stats[r] = {MinusInfinity(), 0.0f};
  bool has_next = true;
  for (int begin = chunk_begin; has_next; begin += kTileColumns) {
    // Chunks begin with stage 0.
    const int stage = begin / kTileColumns % 2;
    const int next = begin + kTileColumns;
    has_next = next % kChunkTokens != 0 && next < at.k.num_tokens;
    if (has_next) {
      load_keys(next, stage ^ 1);
      simt.template WaitCopies<1>();
    } else {
      simt.template WaitCopies<0>();
    }
    simt.SyncBlock();
    float logits[Tile::kRows][Tile::kColumns];
    Tile::Compute(simt, q_rows + simt.warp() * Tile::kRowsPerWarp * pitch,
                  k_rows + stage * kTileColumns * pitch, pitch, p.shape.padded_dim, kTileColumns,
                  logits);
    const bool is_masked = begin + kTileColumns - 1 > at.unit.smallest_limit;
    AddRowStats<Tile>(
        simt, p.shape.scale2, begin, is_masked, limit,
        [&](int r, int c) -> float& { return logits[r][c]; }, stats);
    // The other stage is filled again in the next round.
    simt.SyncBlock();
  }
  StoreRowStats<Tile>(simt, at.unit.num_rows - first_row, stats,
                      [&](int row) { return PlaceOfStat(simt, p, first_row + row); });
}

template <typename Simt>
KEEPSET_KERNEL_BODY void FmaRowStats::Run(const Simt& simt, const Params& p) {
  using Tile = FmaTile;
  const UnitOfBlock at = FindUnit(p, simt.block_z());
  const int first_row = simt.block_y() * Tile::kTileRows;
  if (first_row >= at.unit.num_rows) return;
  auto* shared = reinterpret_cast<float*>(simt.shared());
  const int chunk_begin = simt.block_x() * kChunkTokens;
  const int chunk_end =
      chunk_begin + kChunkTokens < at.k.num_tokens ? chunk_begin + kChunkTokens : at.k.num_tokens;
  const auto limit = [&](int r) {
    return UnitRowLimit(p, at.unit, first_row + Tile::Row(simt.thread(), r));
  };
  RowStat stats[Tile::kRows];
  for (int r = 0; r < Tile::kRows; ++r) stats[r] = {MinusInfinity(), 0.0f};
  for (int begin = chunk_begin; begin < chunk_end; begin += kTileColumns) {
    float logits[Tile::kRows][Tile::kColumns];
    Tile::Compute(
        simt, shared, at.k.head_dim, p.shape.q_dtype,
        [&](int i) -> const std::byte* {
          return first_row + i < at.unit.num_rows
                     ? QueryRow(p, at.layer, at.unit.first_row + first_row + i)
                     : nullptr;
        },
        at.k.dtype,
        [&](int i) -> const std::byte* {
          return begin + i < chunk_end ? at.keys + at.k.TokenOffset(begin + i) : nullptr;
        },
        logits);
    const bool is_masked = begin + kTileColumns - 1 > at.unit.smallest_limit;
    AddRowStats<Tile>(
        simt, p.shape.scale2, begin, is_masked, limit,
        [&](int r, int c) -> float& { return logits[r][c]; }, stats);
  }
  StoreRowStats<Tile>(simt, at.unit.num_rows - first_row, stats,
                      [&](int row) { return PlaceOfStat(simt, p, first_row + row); });
}

template <typename Simt>
KEEPSET_KERNEL_BODY void MergeRowStats::Run(const Simt& simt, const Params& p) {
  const UnitOfBlock at = FindUnit(p, simt.block_z());
  const int row = simt.block_x() * simt.num_warps() + simt.warp();
  if (row >= at.unit.num_rows) return;
  const int num_parts = p.shape.num_chunks * p.chunk_parts;
  const RowStat* parts =
      p.partial + (static_cast<int64_t>(at.index) * p.max_unit_rows + row) * num_parts;
  RowStat stat = {MinusInfinity(), 0.0f};
  for (int part = simt.lane(); part < num_parts; part += 32) {
    stat = MergeStats(simt, stat, parts[part]);
  }
  stat = JoinLaneStats<32>(simt, stat);
  if (simt.lane() != 0) return;
  const float reference = stat.max + simt.Log2(stat.sum);
  const int list_row = at.unit.first_row + row;
  p.references[static_cast<int64_t>(at.layer) * p.num_rows + list_row] = reference;
  if (!IsFiniteValue(reference)) {
    simt.MinGlobal(p.layers[at.layer].fault,
                   FaultCode(FaultKind::kRowSum, PlaceOfRow(p, list_row)));
  }
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_ROW_STATS_KERNEL_H_
