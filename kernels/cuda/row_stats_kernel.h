// Bodies of the kernels of window_scores.h that find the log-sum-exp of every row.
#ifndef KEEPSET_KERNELS_CUDA_ROW_STATS_KERNEL_H_
#define KEEPSET_KERNELS_CUDA_ROW_STATS_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/fault_code.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/logit_tiles.h"
#include "kernels/cuda/window_rows_inl.h"
#include "kernels/cuda/window_scores.h"

namespace keepset::kernels::cuda {

template <typename Simt>
KEEPSET_KERNEL_BODY inline RowStat MergeStats(const Simt& simt, RowStat a, RowStat b) {
  RowStat merged;
  merged.max = a.max < b.max ? b.max : a.max;
  // Rows that see nothing: -inf - 0 is -inf, of which the power is 0.
  const float reference = merged.max == MinusInfinity() ? 0.0f : merged.max;
  merged.sum = a.sum * simt.Exp2(a.max - reference) + b.sum * simt.Exp2(b.max - reference);
  return merged;
}

// Adds a tile of raw logits to the statistics of the thread's rows. limit(r): last visible position
// of row r, asked for where tokens are masked only; tokens of the tile start at `begin`.
template <typename Tile, typename Simt, typename Limit>
KEEPSET_KERNEL_BODY inline void AddRowStats(const Simt& simt, float scale2, int begin,
                                            bool is_masked, Limit limit,
                                            float (&logits)[Tile::kRows][Tile::kColumns],
                                            RowStat (&stats)[Tile::kRows]) {
  KEEPSET_UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    if (is_masked) {
      const int last = limit(r);
      KEEPSET_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c) {
        if (begin + Tile::Column(simt.thread(), c) > last) logits[r][c] = MinusInfinity();
      }
    }
    float largest = logits[r][0];
    KEEPSET_UNROLL
    for (int c = 1; c < Tile::kColumns; ++c) largest = simt.Max(largest, logits[r][c]);
    // The scale is positive, so the largest scaled logit is the scaled largest.
    const float max = simt.Max(stats[r].max, largest * scale2);
    const float reference = max == MinusInfinity() ? 0.0f : max;
    float sum = 0.0f;
    KEEPSET_UNROLL
    for (int c = 0; c < Tile::kColumns; ++c) {
      sum += simt.Exp2(logits[r][c] * scale2 - reference);
    }
    stats[r].sum = stats[r].sum * simt.Exp2(stats[r].max - reference) + sum;
    stats[r].max = max;
  }
}

// Joins the statistics of the lanes that share rows and stores them.
template <typename Tile, typename Simt>
KEEPSET_KERNEL_BODY inline void StoreRowStats(const Simt& simt, const WindowParams& p,
                                              const UnitOfBlock& at, int first_row,
                                              RowStat (&stats)[Tile::kRows]) {
  KEEPSET_UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    KEEPSET_UNROLL
    for (int mask = 1; mask < Tile::kLanesPerRow; mask *= 2) {
      const RowStat other = {simt.ShuffleXor(stats[r].max, mask),
                             simt.ShuffleXor(stats[r].sum, mask)};
      stats[r] = MergeStats(simt, stats[r], other);
    }
    const int row = Tile::Row(simt.thread(), r);
    if ((simt.lane() & (Tile::kLanesPerRow - 1)) == 0 && row < at.unit.num_rows - first_row) {
      const int64_t place =
          static_cast<int64_t>(simt.block_z()) * p.max_unit_rows + first_row + row;
      p.partial[place * p.shape.num_chunks + simt.block_x()] = stats[r];
    }
  }
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
  const auto reference = static_cast<float>(lse * kLog2E);
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
    AddRowStats<Tile>(simt, p.shape.scale2, begin, is_masked, limit, logits, stats);
    // The other stage is filled again in the next round.
    simt.SyncBlock();
  }
  StoreRowStats<Tile>(simt, p, at, first_row, stats);
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
    AddRowStats<Tile>(simt, p.shape.scale2, begin, is_masked, limit, logits, stats);
  }
  StoreRowStats<Tile>(simt, p, at, first_row, stats);
}

template <typename Simt>
KEEPSET_KERNEL_BODY void MergeRowStats::Run(const Simt& simt, const Params& p) {
  const UnitOfBlock at = FindUnit(p, simt.block_z());
  const int row = simt.block_x() * simt.num_warps() + simt.warp();
  if (row >= at.unit.num_rows) return;
  const RowStat* chunks =
      p.partial + (static_cast<int64_t>(at.index) * p.max_unit_rows + row) * p.shape.num_chunks;
  RowStat stat = {MinusInfinity(), 0.0f};
  for (int chunk = simt.lane(); chunk < p.shape.num_chunks; chunk += 32) {
    stat = MergeStats(simt, stat, chunks[chunk]);
  }
  for (int mask = 1; mask < 32; mask *= 2) {
    const RowStat other = {simt.ShuffleXor(stat.max, mask), simt.ShuffleXor(stat.sum, mask)};
    stat = MergeStats(simt, stat, other);
  }
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
