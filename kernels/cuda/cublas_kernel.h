// Bodies of the kernels of cublas_window.h.
#ifndef KEEPSET_KERNELS_CUDA_CUBLAS_KERNEL_H_
#define KEEPSET_KERNELS_CUDA_CUBLAS_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/column_inl.h"
#include "kernels/cuda/columns_kernel.h"
#include "kernels/cuda/cublas_window.h"
#include "kernels/cuda/element.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/row_norm_inl.h"
#include "kernels/cuda/row_stat_inl.h"
#include "kernels/cuda/window_rows_inl.h"

namespace keepset::kernels::cuda {

// How a warp shares 256 logits of one row.
struct WarpRowTile {
  static constexpr int kRows = 1;
  static constexpr int kColumns = 8;
  static constexpr int kTokens = 32 * kColumns;
  KEEPSET_HD static int Column(int thread, int c) { return (thread & 31) + 32 * c; }
};

// One row by one warp, widened to `to_dtype` where that is another type. from: null for zeros.
// padded_dim: a multiple of 8; `to` is aligned to 16 bytes.
template <typename Simt>
KEEPSET_KERNEL_BODY inline void PackRow(const Simt& simt, const std::byte* from, DType from_dtype,
                                        int head_dim, std::byte* to, DType to_dtype,
                                        int padded_dim) {
  const auto bytes = static_cast<int>(DTypeBytes(to_dtype));
  const bool is_whole = from_dtype == to_dtype && head_dim == padded_dim &&
                        (reinterpret_cast<uintptr_t>(from) & 15) == 0;
  if (is_whole && from != nullptr) {
    const auto* pieces = reinterpret_cast<const Piece*>(from);
    auto* out = reinterpret_cast<Piece*>(to);
    for (int i = simt.lane(); i < padded_dim * bytes / 16; i += 32) out[i] = pieces[i];
    return;
  }
  for (int i = simt.lane(); i < padded_dim; i += 32) {
    const bool is_used = from != nullptr && i < head_dim;
    if (to_dtype == DType::kF32) {
      reinterpret_cast<float*>(to)[i] = is_used ? LoadElement(from, i, from_dtype) : 0.0f;
    } else {
      // Of one type: the bits.
      reinterpret_cast<uint16_t*>(to)[i] =
          is_used ? reinterpret_cast<const uint16_t*>(from)[i] : uint16_t{0};
    }
  }
}

template <typename Simt>
KEEPSET_KERNEL_BODY void PackQueries::Run(const Simt& simt, const Params& p) {
  const UnitOfBlock at = FindUnit(p.window, simt.block_y());
  const int row = simt.block_x() * simt.num_warps() + simt.warp();
  if (row >= p.window.max_unit_rows) return;
  const std::byte* from =
      row < at.unit.num_rows ? QueryRow(p.window, at.layer, at.unit.first_row + row) : nullptr;
  const int64_t place = static_cast<int64_t>(at.index) * p.window.max_unit_rows + row;
  PackRow(simt, from, p.window.shape.q_dtype, at.k.head_dim,
          p.queries + place * p.padded_dim * DTypeBytes(p.dtype), p.dtype, p.padded_dim);
}

template <typename Simt>
KEEPSET_KERNEL_BODY void PackKeys::Run(const Simt& simt, const Params& p) {
  const UnitOfBlock at = FindUnit(p.window, simt.block_y());
  const int token = simt.block_x() * simt.num_warps() + simt.warp();
  if (token >= p.num_tokens) return;
  const int64_t place = static_cast<int64_t>(at.index) * p.tokens_at_once + token;
  PackRow(simt, at.keys + at.k.TokenOffset(p.first_token + token), at.k.dtype, at.k.head_dim,
          p.keys + place * p.padded_dim * DTypeBytes(p.dtype), p.dtype, p.padded_dim);
}

// Logits of the piece's tokens and a row of a unit of it.
KEEPSET_HD inline const float* LogitRow(const CublasParams& p, int unit, int row) {
  return p.logits +
         (static_cast<int64_t>(unit) * p.rows_at_once + (row - p.first_row)) * p.tokens_at_once;
}

template <typename Simt>
KEEPSET_KERNEL_BODY void PieceStats::Run(const Simt& simt, const Params& p) {
  using Tile = WarpRowTile;
  const UnitOfBlock at = FindUnit(p.window, simt.block_y());
  const int in_piece = simt.block_x() * simt.num_warps() + simt.warp();
  const int row = p.first_row + in_piece;
  if (in_piece >= p.num_rows || row >= at.unit.num_rows) return;
  const float* from = LogitRow(p, at.index, row);
  const int last_seen = p.window.rows[at.unit.first_row + row].limit;
  RowStat stats[1] = {{MinusInfinity(), 0.0f}};
  for (int begin = 0; begin < p.num_tokens; begin += Tile::kTokens) {
    float logits[1][Tile::kColumns];
    KEEPSET_UNROLL
    for (int c = 0; c < Tile::kColumns; ++c) {
      const int token = begin + Tile::Column(simt.thread(), c);
      logits[0][c] = token < p.num_tokens ? from[token] : MinusInfinity();
    }
    const int first_token = p.first_token + begin;
    AddRowStats<Tile>(
        simt, p.window.shape.scale2, first_token, first_token + Tile::kTokens - 1 > last_seen,
        [&](int /*r*/) { return last_seen; }, [&](int r, int c) -> float& { return logits[r][c]; },
        stats);
  }
  const RowStat joined = JoinLaneStats<32>(simt, stats[0]);
  if (simt.lane() != 0) return;
  RowStat* place = p.window.partial + static_cast<int64_t>(at.index) * p.window.max_unit_rows + row;
  *place = p.first_token == 0 ? joined : MergeStats(simt, *place, joined);
}

// Adds the rows of the piece to the unit's columns of one token.
template <typename Simt>
KEEPSET_KERNEL_BODY inline ColumnCheck AddPieceColumns(const Simt& simt, const CublasParams& p,
                                                       const UnitOfBlock& at, int in_piece) {
  const WindowParams& window = p.window;
  const int end_row = p.first_row + p.num_rows;
  const int token = p.first_token + in_piece;
  const bool is_masked = token > at.unit.smallest_limit;
  const float* references = window.references + static_cast<int64_t>(at.layer) * window.num_rows;
  ColumnCheck check;
  for (int j = simt.block_y(); j < at.unit.num_outputs; j += simt.grid_y()) {
    const WindowOutput output = window.outputs[at.unit.first_output + j];
    const int first = output.first_row - at.unit.first_row;  // of the unit's rows
    const int end = first + output.num_rows;
    const int begin = first > p.first_row ? first : p.first_row;
    const int stop = end < end_row ? end : end_row;
    if (begin >= stop) continue;
    float* out = window.layers[at.layer].out +
                 static_cast<int64_t>(output.out_row) * at.k.num_tokens + token;
    const bool is_max = output.reduction == ColumnReduction::kMax;
    float column = begin == first ? 0.0f : *out;
    for (int row = begin; row < stop; ++row) {
      const int list_row = at.unit.first_row + row;
      const float logit = LogitRow(p, at.index, row)[in_piece];
      check.SeeLogit(logit);
      float share = simt.Exp2(logit * window.shape.scale2 - references[list_row]);
      if (is_masked && token > window.rows[list_row].limit) share = 0.0f;
      column = is_max ? simt.Max(column, share) : column + share;
    }
    if (stop == end) {
      check.SeeColumn(column);
      column = simt.Div(column, output.divisor);
    }
    *out = column;
  }
  return check;
}

template <typename Simt>
KEEPSET_KERNEL_BODY void PieceColumns::Run(const Simt& simt, const Params& p) {
  const WindowParams& window = p.window;
  const UnitOfBlock at = FindUnit(window, simt.block_z());
  const int first_in_piece = simt.block_x() * simt.num_threads();
  const int end_row = p.first_row + p.num_rows;
  if (simt.block_y() == 0 && end_row >= window.max_unit_rows) {
    StoreValueNorms(simt, window, at, p.first_token + first_in_piece + simt.warp() * 32, 32);
  }
  const int in_piece = first_in_piece + simt.thread();
  const bool is_suspect =
      in_piece < p.num_tokens && AddPieceColumns(simt, p, at, in_piece).IsSuspect();
  ReportFirstColumn(simt, window, at, is_suspect ? p.first_token + in_piece : kNoToken);
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_CUBLAS_KERNEL_H_
