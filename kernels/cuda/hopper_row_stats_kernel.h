// Body of HopperRowStats: query rows are the rows of the products, tokens their columns, so that a
// thread keeps the statistics of its rows and the lanes meet once per chunk.
//
// The products of a chunk (tile after tile, and of a tile 64 rows after 64 rows) are counted, and
// the two groups take them in turns. With an even number of them per tile a group has the same rows
// in every tile; with an odd one, and so with 64 rows or fewer, in every other tile. Statistics are
// therefore kept apart for even and odd tiles, whoever has them, and joined by MergeRowStats: a row
// has the same bits in any company.
#ifndef KEEPSET_KERNELS_CUDA_HOPPER_ROW_STATS_KERNEL_H_
#define KEEPSET_KERNELS_CUDA_HOPPER_ROW_STATS_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/hopper_pipeline_inl.h"
#include "kernels/cuda/hopper_window.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/row_stat_inl.h"
#include "kernels/cuda/window_rows_inl.h"

namespace keepset::kernels::cuda {

constexpr int kProductsPerGroup = kStatsRows / kProductRows / kMathGroups;  // of a tile
static_assert(kStatsParts == 2);                                            // even tiles, odd tiles

// Logits of a product as AddRowStats takes them.
template <int kTokens>
struct HopperTile {
  static constexpr int kRows = 2;
  static constexpr int kColumns = kTokens / 4;
  static constexpr int kLanesPerRow = 4;
  // Within a product.
  KEEPSET_HD static int Row(int thread, int r) {
    return ((thread >> 5) & (kGroupWarps - 1)) * 16 + ((thread & 31) >> 2) + 8 * r;
  }
  KEEPSET_HD static int Column(int thread, int c) {
    return (c >> 1) * 8 + (thread & 3) * 2 + (c & 1);
  }
};

// A chunk of tokens for some rows of a unit.
struct StatsTask {
  UnitOfBlock at;
  int first_row;
  int num_rows;  // none where the unit has fewer rows than others
  int chunk;
  int begin;  // tokens
  int end;
};

// part_rows: query rows that a block holds.
KEEPSET_HD inline StatsTask FindStatsTask(const WindowParams& p, int part_rows, int64_t task) {
  const int parts = (p.max_unit_rows + part_rows - 1) / part_rows;
  const int64_t part = task / p.shape.num_chunks;
  const UnitOfBlock at = FindUnit(p, static_cast<int>(part / parts));
  const int first_row = static_cast<int>(part % parts) * part_rows;
  const int rows = at.unit.num_rows - first_row;
  const auto chunk = static_cast<int>(task % p.shape.num_chunks);
  const int begin = chunk * kChunkTokens;
  const int left = at.k.num_tokens - begin;
  return {at,    first_row, rows < 0 ? 0 : rows < part_rows ? rows : part_rows,
          chunk, begin,     begin + (left < kChunkTokens ? left : kChunkTokens)};
}

// The first product of a tile that a group takes; it takes every other one from there on.
KEEPSET_HD inline int FirstProduct(int group, int tile, int products) {
  return (group + tile * products) & 1;
}

KEEPSET_KERNEL_BODY inline void SwapStats(RowStat (&a)[kProductsPerGroup][2],
                                          RowStat (&b)[kProductsPerGroup][2]) {
  KEEPSET_UNROLL
  for (int j = 0; j < kProductsPerGroup; ++j) {
    KEEPSET_UNROLL
    for (int r = 0; r < 2; ++r) {
      const RowStat stat = a[j][r];
      a[j][r] = b[j][r];
      b[j][r] = stat;
    }
  }
}

// Statistics of every other product from the first on, as part `part` of their chunk.
template <int kTokens, typename Simt>
KEEPSET_KERNEL_BODY inline void StoreChunkStats(const Simt& simt, const WindowParams& p,
                                                const StatsTask& task, int first_product, int part,
                                                const RowStat (&stats)[kProductsPerGroup][2]) {
  const int64_t parts = static_cast<int64_t>(p.shape.num_chunks) * kStatsParts;
  const int64_t first_place =
      static_cast<int64_t>(task.at.index) * p.max_unit_rows + task.first_row;
  RowStat* const of_part = p.partial + first_place * parts + task.chunk * kStatsParts + part;
  KEEPSET_UNROLL
  for (int j = 0; j < kProductsPerGroup; ++j) {
    const int first_row = (first_product + j * kMathGroups) * kProductRows;
    if (first_row >= task.num_rows) break;
    StoreRowStats<HopperTile<kTokens>>(simt, task.num_rows - first_row, stats[j], [&](int row) {
      return of_part + (first_row + row) * parts;
    });
  }
}

template <DType kType, int kTokens>
template <typename Simt>
KEEPSET_KERNEL_BODY void HopperRowStats<kType, kTokens>::Run(const Simt& simt, const Params& p) {
  using Tile = HopperTile<kTokens>;
  const WindowParams& window = p.window;
  const HopperLayout layout(p.keys.num_spans, p.num_slots, kTokens, p.num_stages);
  std::byte* const shared = AlignedShared(simt);
  const KeyRing ring = MakeRing(simt, layout, shared, p.num_stages, kMathGroups * kGroupWarps);
  const TaskRange range = RangeOfBlock(simt, p.num_tasks);
  const int group = simt.warp() / kGroupWarps - 1;
  StageCursor cursor;
  if (group < 0) {
    simt.template ShrinkRegisters<kLoaderRegisters>();
    if (simt.warp() != 0) return;
    for (int64_t i = range.begin; i < range.end; ++i) {
      const StatsTask task = FindStatsTask(window, p.num_slots, i);
      if (task.num_rows == 0) continue;
      if (simt.lane() == 0) simt.PrefetchMap(p.key_maps[task.at.layer]);
      for (int begin = task.begin; begin < task.end; begin += kTokens) {
        LoadKeys(simt, p, task.at, begin, kTokens, ring, cursor);
        cursor.Advance(1, p.num_stages);
      }
    }
    return;
  }

  simt.template GrowRegisters<kMathRegisters>();
  const int math_thread = simt.thread() - kGroupThreads;
  const Turns turns(simt, group);
  int64_t loaded = -1;  // the part whose queries are in shared memory
  for (int64_t i = range.begin; i < range.end; ++i) {
    const StatsTask task = FindStatsTask(window, p.num_slots, i);
    if (task.num_rows == 0) continue;
    const int64_t part = i / window.shape.num_chunks;
    if (part != loaded) {
      // The queries before have been used up.
      simt.SyncNamed(kQueriesBarrier, kMathThreads);
      const int products = (task.num_rows + kProductRows - 1) / kProductRows;
      LoadQueries(simt, math_thread, p.keys.num_spans, task.at.k.head_dim, p.num_slots,
                  products * kProductRows, shared, window.layers[task.at.layer].q,
                  [&](int slot) -> const std::byte* {
                    return slot < task.num_rows
                               ? QueryRow(window, task.at.layer,
                                          task.at.unit.first_row + task.first_row + slot)
                               : nullptr;
                  });
      simt.SyncNamed(kQueriesBarrier, kMathThreads);
      loaded = part;
    }
    const int products = (task.num_rows + kProductRows - 1) / kProductRows;
    // Of the tiles of this one's kind, and of the others: they change places from tile to tile.
    RowStat stats[kProductsPerGroup][Tile::kRows];
    RowStat others[kProductsPerGroup][Tile::kRows];
    KEEPSET_UNROLL
    for (int j = 0; j < kProductsPerGroup; ++j) {
      KEEPSET_UNROLL
      for (int r = 0; r < Tile::kRows; ++r) stats[j][r] = others[j][r] = {MinusInfinity(), 0.0f};
    }
    int tile = 0;
    for (int begin = task.begin; begin < task.end; begin += kTokens, ++tile) {
      // Also of a tile that is all the other group's: it is given back in its own phase.
      simt.WaitPhase(ring.full + cursor.stage(), cursor.parity());
      const bool is_masked = begin + kTokens - 1 > task.at.unit.smallest_limit;
      const int first_product = FirstProduct(group, tile, products);
      KEEPSET_UNROLL
      for (int j = 0; j < kProductsPerGroup; ++j) {
        const int product = first_product + j * kMathGroups;
        if (product >= products) break;
        turns.Take(simt);
        float d[kTokens / 2];
        QueueProduct<kType, kTokens>(simt, shared + product * kProductRows * kSpanBytes,
                                     p.num_slots, ring.Stage(cursor), kTokens, p.keys.num_spans, d);
        turns.Give(simt);
        simt.WaitMma(d);
        const auto logits = [&](int r, int c) -> float& {
          return d[(c >> 1) * 4 + 2 * r + (c & 1)];
        };
        const auto limit = [&](int r) {
          return UnitRowLimit(
              window, task.at.unit,
              task.first_row + product * kProductRows + Tile::Row(simt.thread(), r));
        };
        AddRowStats<Tile>(simt, window.shape.scale2, begin, is_masked, limit, logits, stats[j]);
      }
      if (simt.lane() == 0) simt.Arrive(ring.empty + cursor.stage());
      cursor.Advance(1, p.num_stages);
      SwapStats(stats, others);
    }
    if (group == 1 && ((tile * products) & 1) != 0) {
      // The first group had one product more.
      turns.Take(simt);
      turns.Give(simt);
    }
    if ((tile & 1) != 0) SwapStats(stats, others);
    StoreChunkStats<kTokens>(simt, window, task, FirstProduct(group, 0, products), 0, stats);
    StoreChunkStats<kTokens>(simt, window, task, FirstProduct(group, 1, products), 1, others);
  }
  turns.End(simt);
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_HOPPER_ROW_STATS_KERNEL_H_
