// Statistics of query rows, as the kernels of both kinds form, join and store them.
#ifndef KEEPSET_KERNELS_CUDA_ROW_STAT_INL_H_
#define KEEPSET_KERNELS_CUDA_ROW_STAT_INL_H_

#include "kernels/cuda/element.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/window_scores.h"

namespace keepset::kernels::cuda {

KEEPSET_HD inline float MinusInfinity() { return FloatOfBits(0xff800000u); }

// What powers of a row are relative to, given its maximum. Rows that see nothing: -inf - 0 is -inf,
// of which the power is 0.
KEEPSET_HD inline float StatReference(float max) { return max == MinusInfinity() ? 0.0f : max; }

// `simt` of these has Max, Exp2 and, where lanes are joined, ShuffleXor.

template <typename Simt>
KEEPSET_HD inline RowStat MergeStats(const Simt& simt, RowStat a, RowStat b) {
  RowStat merged;
  merged.max = simt.Max(a.max, b.max);
  const float reference = StatReference(merged.max);
  merged.sum = a.sum * simt.Exp2(a.max - reference) + b.sum * simt.Exp2(b.max - reference);
  return merged;
}

// Joins kLanes neighbouring lanes of a warp, which all hold the result then, with the same bits:
// the maximum first, so that a lane needs one power. kLanes: a power of two.
template <int kLanes, typename Simt>
KEEPSET_HD inline RowStat JoinLaneStats(const Simt& simt, RowStat stat) {
  RowStat joined = stat;
  KEEPSET_UNROLL
  for (int mask = 1; mask < kLanes; mask *= 2) {
    joined.max = simt.Max(joined.max, simt.ShuffleXor(joined.max, mask));
  }
  joined.sum = stat.sum * simt.Exp2(stat.max - StatReference(joined.max));
  KEEPSET_UNROLL
  for (int mask = 1; mask < kLanes; mask *= 2) {
    joined.sum += simt.ShuffleXor(joined.sum, mask);
  }
  return joined;
}

// Adds a tile of raw logits to the statistics of the thread's rows. logits(r, c): the logit of row
// r and column c, which masking changes. limit(r): last visible position of row r, asked for where
// tokens are masked only; tokens of the tile start at `begin`. Rows are independent, and of each
// row a few maxima and sums, so that the instructions of one need not wait for those of another.
template <typename Tile, typename Simt, typename Limit, typename Logits>
KEEPSET_KERNEL_BODY inline void AddRowStats(const Simt& simt, float scale2, int begin,
                                            bool is_masked, Limit limit, Logits logits,
                                            RowStat (&stats)[Tile::kRows]) {
  constexpr int kMaxima = Tile::kColumns < 4 ? Tile::kColumns : 4;
  constexpr int kSums = Tile::kColumns < 2 ? Tile::kColumns : 2;
  if (is_masked) {
    KEEPSET_UNROLL
    for (int r = 0; r < Tile::kRows; ++r) {
      const int last = limit(r);
      KEEPSET_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c) {
        if (begin + Tile::Column(simt.thread(), c) > last) logits(r, c) = MinusInfinity();
      }
    }
  }
  float maxima[Tile::kRows][kMaxima];
  KEEPSET_UNROLL
  for (int c = 0; c < Tile::kColumns; ++c) {
    KEEPSET_UNROLL
    for (int r = 0; r < Tile::kRows; ++r) {
      float& largest = maxima[r][c % kMaxima];
      largest = c < kMaxima ? logits(r, c) : simt.Max(largest, logits(r, c));
    }
  }
  float max[Tile::kRows];
  float reference[Tile::kRows];
  KEEPSET_UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    float largest = maxima[r][0];
    KEEPSET_UNROLL
    for (int i = 1; i < kMaxima; ++i) largest = simt.Max(largest, maxima[r][i]);
    // The scale is positive, so the largest scaled logit is the scaled largest.
    max[r] = simt.Max(stats[r].max, largest * scale2);
    reference[r] = StatReference(max[r]);
  }
  float sums[Tile::kRows][kSums] = {};
  KEEPSET_UNROLL
  for (int c = 0; c < Tile::kColumns; ++c) {
    KEEPSET_UNROLL
    for (int r = 0; r < Tile::kRows; ++r) {
      sums[r][c % kSums] += simt.Exp2(logits(r, c) * scale2 - reference[r]);
    }
  }
  KEEPSET_UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    float sum = sums[r][0];
    KEEPSET_UNROLL
    for (int i = 1; i < kSums; ++i) sum += sums[r][i];
    stats[r].sum = stats[r].sum * simt.Exp2(stats[r].max - reference[r]) + sum;
    stats[r].max = max[r];
  }
}

// Joins the lanes that share rows of the tile, and stores its first num_rows rows: place(row)
// points at where row `row` of the tile goes.
template <typename Tile, typename Simt, typename Place>
KEEPSET_KERNEL_BODY inline void StoreRowStats(const Simt& simt, int num_rows,
                                              const RowStat (&stats)[Tile::kRows], Place place) {
  KEEPSET_UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    const RowStat joined = JoinLaneStats<Tile::kLanesPerRow>(simt, stats[r]);
    const int row = Tile::Row(simt.thread(), r);
    if ((simt.lane() & (Tile::kLanesPerRow - 1)) == 0 && row < num_rows) *place(row) = joined;
  }
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_ROW_STAT_INL_H_
