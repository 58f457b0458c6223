// Bodies of the kernels of window_scores.h.
#ifndef KEEPSET_KERNELS_CUDA_WINDOW_SCORES_KERNEL_H_
#define KEEPSET_KERNELS_CUDA_WINDOW_SCORES_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/fault_code.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/logit_tiles.h"
#include "kernels/cuda/row_norm_inl.h"
#include "kernels/cuda/window_scores.h"

namespace keepset::kernels::cuda {

// Logits this far above a given log-sum-exp say that it is not the row's (limit of the CPU
// backend).
constexpr float kMostAboveLse = 126.0f;
constexpr float kMostColumn = 8.507059173023462e37f;  // 2^126

KEEPSET_HD inline float MinusInfinity() { return FloatOfBits(0xff800000u); }

template <typename Simt>
KEEPSET_KERNEL_BODY inline RowStat MergeStats(const Simt& simt, RowStat a, RowStat b) {
  RowStat merged;
  merged.max = a.max < b.max ? b.max : a.max;
  // Rows that see nothing: -inf - 0 is -inf, of which the power is 0.
  const float reference = merged.max == MinusInfinity() ? 0.0f : merged.max;
  merged.sum = a.sum * simt.Exp2(a.max - reference) + b.sum * simt.Exp2(b.max - reference);
  return merged;
}

// Query row `row` of the rows that share a KV head.
KEEPSET_HD inline const std::byte* GroupQueryRow(const WindowParams& p, int kv_head, int row) {
  const uint32_t j = p.row_divider.Quotient(static_cast<uint32_t>(row));
  const uint32_t i = p.row_divider.Remainder(static_cast<uint32_t>(row), j);
  return p.q + (static_cast<int64_t>(kv_head) * p.group + j) * p.q_head_bytes + i * p.q_row_bytes;
}

// The last position that a row of the group sees; -1 for rows past the last.
KEEPSET_HD inline int GroupRowLimit(const WindowParams& p, int row) {
  if (row >= p.group * p.num_rows) return -1;
  const uint32_t j = p.row_divider.Quotient(static_cast<uint32_t>(row));
  return p.row_limits[p.row_divider.Remainder(static_cast<uint32_t>(row), j)];
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

// Adds a tile of raw logits to the statistics of the thread's rows. limits: last visible position
// of each; tokens of the tile start at `begin`.
template <typename Tile, typename Simt>
KEEPSET_KERNEL_BODY inline void AddRowStats(const Simt& simt, float scale2, int begin,
                                            bool is_masked, const int (&limits)[Tile::kRows],
                                            float (&logits)[Tile::kRows][Tile::kColumns],
                                            RowStat (&stats)[Tile::kRows]) {
  KEEPSET_UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    if (is_masked) {
      KEEPSET_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c) {
        if (begin + Tile::Column(simt.thread(), c) > limits[r]) logits[r][c] = MinusInfinity();
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
                                              int first_row, RowStat (&stats)[Tile::kRows]) {
  KEEPSET_UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    KEEPSET_UNROLL
    for (int mask = 1; mask < Tile::kLanesPerRow; mask *= 2) {
      const RowStat other = {simt.ShuffleXor(stats[r].max, mask),
                             simt.ShuffleXor(stats[r].sum, mask)};
      stats[r] = MergeStats(simt, stats[r], other);
    }
    const int row = first_row + Tile::Row(simt.thread(), r);
    const int64_t rows = static_cast<int64_t>(p.group) * p.num_rows;
    if ((simt.lane() & (Tile::kLanesPerRow - 1)) == 0 && row < rows) {
      p.partial[(simt.block_z() * rows + row) * p.num_chunks + simt.block_x()] = stats[r];
    }
  }
}

template <typename Simt>
KEEPSET_KERNEL_BODY void PrepareRows::Run(const Simt& simt, const Params& p) {
  const int64_t rows = int64_t{p.k.num_heads} * p.group * p.num_rows;
  const int64_t row = static_cast<int64_t>(simt.block_x()) * simt.num_warps() + simt.warp();
  if (row >= rows) return;
  const auto head = static_cast<int>(row / p.num_rows);
  const auto i = static_cast<int>(row - static_cast<int64_t>(head) * p.num_rows);
  const int64_t place = static_cast<int64_t>(head) * p.all_rows + p.row_base + i;
  const std::byte* q = p.q + head * p.q_head_bytes + i * p.q_row_bytes;
  bool is_finite = true;
  for (int channel = simt.lane(); channel < p.k.head_dim; channel += 32) {
    is_finite = is_finite && IsFiniteValue(LoadElement(q, channel, p.q_dtype));
  }
  if (!is_finite) simt.MinGlobal(p.fault, FaultCode(FaultKind::kQuery, place));
  if (p.lse == nullptr || simt.lane() != 0) return;
  constexpr double kLog2E = 1.4426950408889634;
  const float lse = LoadElement(p.lse + head * p.lse_head_bytes, i, p.lse_dtype);
  const auto reference = static_cast<float>(lse * kLog2E);
  if (!IsFiniteValue(reference)) simt.MinGlobal(p.fault, FaultCode(FaultKind::kLse, place));
  p.references[row] = reference;
}

template <DType kType>
template <typename Simt>
KEEPSET_KERNEL_BODY void MmaRowStats<kType>::Run(const Simt& simt, const Params& p) {
  using Tile = MmaTile<kType>;
  const int pitch = Tile::PitchBytes(p.padded_dim);
  const int tile_rows = Tile::kRowsPerWarp * simt.num_warps();
  const int first_row = simt.block_y() * tile_rows;
  const int kv_head = p.first_kv_head + simt.block_z();
  const int rows = p.group * p.num_rows;
  std::byte* q_rows = simt.shared();
  std::byte* k_rows = q_rows + tile_rows * pitch;  // two stages of kTileColumns rows

  const RowCopier copier(simt, p.k.head_dim, p.padded_dim);
  copier.Copy(simt, tile_rows, q_rows, pitch, p.q, [&](int i) -> const std::byte* {
    return first_row + i < rows ? GroupQueryRow(p, kv_head, first_row + i) : nullptr;
  });
  simt.CommitCopies();

  const std::byte* keys = p.k.data + kv_head * p.k.head_bytes;
  const int chunk_begin = simt.block_x() * kChunkTokens;
  const int chunk_end =
      chunk_begin + kChunkTokens < p.k.num_tokens ? chunk_begin + kChunkTokens : p.k.num_tokens;
  const auto load_keys = [&](int begin, int stage) {
    copier.Copy(simt, kTileColumns, k_rows + stage * kTileColumns * pitch, pitch, p.k.data,
                [&](int i) -> const std::byte* {
                  return begin + i < chunk_end ? keys + p.k.TokenOffset(begin + i) : nullptr;
                });
    simt.CommitCopies();
  };
  load_keys(chunk_begin, 0);

  int limits[Tile::kRows];
  RowStat stats[Tile::kRows];
  KEEPSET_UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    limits[r] = GroupRowLimit(p, first_row + Tile::Row(simt.thread(), r));
    stats[r] = {MinusInfinity(), 0.0f};
  }
  const int smallest_limit = p.row_limits[0];
  int stage = 0;
  for (int begin = chunk_begin; begin < chunk_end; begin += kTileColumns) {
    if (begin + kTileColumns < chunk_end) {
      load_keys(begin + kTileColumns, stage ^ 1);
      simt.template WaitCopies<1>();
    } else {
      simt.template WaitCopies<0>();
    }
    simt.SyncBlock();
    float logits[Tile::kRows][Tile::kColumns];
    Tile::Compute(simt, q_rows + simt.warp() * Tile::kRowsPerWarp * pitch,
                  k_rows + stage * kTileColumns * pitch, pitch, p.padded_dim, kTileColumns, logits);
    const bool is_masked = begin + kTileColumns - 1 > smallest_limit;
    AddRowStats<Tile>(simt, p.scale2, begin, is_masked, limits, logits, stats);
    // The other stage is filled again in the next round.
    simt.SyncBlock();
    stage ^= 1;
  }
  StoreRowStats<Tile>(simt, p, first_row, stats);
}

template <typename Simt>
KEEPSET_KERNEL_BODY void FmaRowStats::Run(const Simt& simt, const Params& p) {
  using Tile = FmaTile;
  const int first_row = simt.block_y() * Tile::kTileRows;
  const int kv_head = p.first_kv_head + simt.block_z();
  const int rows = p.group * p.num_rows;
  auto* shared = reinterpret_cast<float*>(simt.shared());
  const std::byte* keys = p.k.data + kv_head * p.k.head_bytes;
  const int chunk_begin = simt.block_x() * kChunkTokens;
  const int chunk_end =
      chunk_begin + kChunkTokens < p.k.num_tokens ? chunk_begin + kChunkTokens : p.k.num_tokens;
  int limits[Tile::kRows];
  RowStat stats[Tile::kRows];
  for (int r = 0; r < Tile::kRows; ++r) {
    limits[r] = GroupRowLimit(p, first_row + Tile::Row(simt.thread(), r));
    stats[r] = {MinusInfinity(), 0.0f};
  }
  for (int begin = chunk_begin; begin < chunk_end; begin += kTileColumns) {
    float logits[Tile::kRows][Tile::kColumns];
    Tile::Compute(
        simt, shared, p.k.head_dim, p.q_dtype,
        [&](int i) -> const std::byte* {
          return first_row + i < rows ? GroupQueryRow(p, kv_head, first_row + i) : nullptr;
        },
        p.k.dtype,
        [&](int i) -> const std::byte* {
          return begin + i < chunk_end ? keys + p.k.TokenOffset(begin + i) : nullptr;
        },
        logits);
    const bool is_masked = begin + kTileColumns - 1 > p.row_limits[0];
    AddRowStats<Tile>(simt, p.scale2, begin, is_masked, limits, logits, stats);
  }
  StoreRowStats<Tile>(simt, p, first_row, stats);
}

template <typename Simt>
KEEPSET_KERNEL_BODY void MergeRowStats::Run(const Simt& simt, const Params& p) {
  const int rows = p.group * p.num_rows;
  const int row = simt.block_x() * simt.num_warps() + simt.warp();
  if (row >= rows) return;
  const int kv_head = p.first_kv_head + simt.block_z();
  const RowStat* chunks =
      p.partial + (static_cast<int64_t>(simt.block_z()) * rows + row) * p.num_chunks;
  RowStat stat = {MinusInfinity(), 0.0f};
  for (int chunk = simt.lane(); chunk < p.num_chunks; chunk += 32) {
    stat = MergeStats(simt, stat, chunks[chunk]);
  }
  for (int mask = 1; mask < 32; mask *= 2) {
    const RowStat other = {simt.ShuffleXor(stat.max, mask), simt.ShuffleXor(stat.sum, mask)};
    stat = MergeStats(simt, stat, other);
  }
  if (simt.lane() != 0) return;
  const float reference = stat.max + simt.Log2(stat.sum);
  const int64_t place = static_cast<int64_t>(kv_head) * rows + row;
  p.references[place] = reference;
  if (!IsFiniteValue(reference)) {
    const int64_t head = place / p.num_rows;
    simt.MinGlobal(p.fault, FaultCode(FaultKind::kRowSum,
                                      head * p.all_rows + p.row_base + place - head * p.num_rows));
  }
}

// Finds out why a column of the given KV head is not a number, or too large. Rare; reads global
// memory element by element.
template <typename Simt>
KEEPSET_KERNEL_BODY inline void ReportColumn(const Simt& simt, const WindowParams& p, int kv_head,
                                             int token) {
  const std::byte* key = p.k.Row(kv_head, token);
  for (int channel = 0; channel < p.k.head_dim; ++channel) {
    if (IsFiniteValue(LoadElement(key, channel, p.k.dtype))) continue;
    simt.MinGlobal(p.fault, FaultCode(FaultKind::kKey,
                                      static_cast<int64_t>(kv_head) * p.k.num_tokens + token));
    return;
  }
  for (int row = 0; row < p.group * p.num_rows; ++row) {
    if (token > GroupRowLimit(p, row)) continue;
    const std::byte* query = GroupQueryRow(p, kv_head, row);
    float dot = 0.0f;
    for (int channel = 0; channel < p.k.head_dim; ++channel) {
      dot += LoadElement(query, channel, p.q_dtype) * LoadElement(key, channel, p.k.dtype);
    }
    const int64_t place = static_cast<int64_t>(kv_head) * p.group * p.num_rows + row;
    const int64_t head = place / p.num_rows;
    const int64_t call_row = head * p.all_rows + p.row_base + place - head * p.num_rows;
    const float logit = dot * p.scale2;
    if (!IsFiniteValue(logit)) {
      simt.MinGlobal(p.fault, FaultCode(FaultKind::kLogit, call_row * p.k.num_tokens + token));
    } else if (p.lse != nullptr && !(logit - p.references[place] < kMostAboveLse)) {
      simt.MinGlobal(p.fault, FaultCode(FaultKind::kLseTooLow, call_row));
    }
  }
}

// The columns that a thread accumulates: its tokens are the rows of the tile, query rows the
// columns.
template <typename Tile, ColumnReduction kReduction>
class ColumnSums {
 public:
  KEEPSET_KERNEL_BODY ColumnSums() { Clear(); }

  KEEPSET_KERNEL_BODY void Clear() {
    KEEPSET_UNROLL
    for (int r = 0; r < Tile::kRows; ++r) columns_[r] = 0.0f;
  }

  // references, limits: of the 64 query rows in shared memory; +inf for rows past the last, of
  // which the probability is then 0.
  template <typename Simt>
  KEEPSET_KERNEL_BODY void Add(const Simt& simt, float scale2, int first_token, bool is_masked,
                               const float* references, const int* limits, int num_rows,
                               const float (&logits)[Tile::kRows][Tile::kColumns]) {
    KEEPSET_UNROLL
    for (int c = 0; c < Tile::kColumns; ++c) {
      if (!Tile::IsUsed(c, num_rows)) continue;
      const int column = Tile::Column(simt.thread(), c);
      const float reference = references[column];
      const int limit = is_masked ? limits[column] : 0;
      KEEPSET_UNROLL
      for (int r = 0; r < Tile::kRows; ++r) {
        // Of every token, seen or not: a key that is not finite makes all its logits so.
        check_[r] += logits[r][c] * 0.0f;
        float p = simt.Exp2(logits[r][c] * scale2 - reference);
        if (is_masked && first_token + Tile::Row(simt.thread(), r) > limit) p = 0.0f;
        if constexpr (kReduction == ColumnReduction::kMax) {
          columns_[r] = simt.Max(columns_[r], p);
        } else {
          columns_[r] += p;
        }
      }
    }
  }

  // Joins the lanes that share tokens, and stores the columns of one query head.
  template <typename Simt>
  KEEPSET_KERNEL_BODY void Store(const Simt& simt, int first_token, int num_tokens, float divisor,
                                 float* out) {
    KEEPSET_UNROLL
    for (int r = 0; r < Tile::kRows; ++r) {
      float column = columns_[r];
      KEEPSET_UNROLL
      for (int mask = 1; mask < Tile::kLanesPerRow; mask *= 2) {
        const float other = simt.ShuffleXor(column, mask);
        column = kReduction == ColumnReduction::kMax ? simt.Max(column, other) : column + other;
      }
      // NaN, too, is not below the limit.
      if (!(column < kMostColumn)) check_[r] = column - column + 1.0f;
      const int token = first_token + Tile::Row(simt.thread(), r);
      if ((simt.lane() & (Tile::kLanesPerRow - 1)) == 0 && token < num_tokens) {
        out[token] = simt.Div(column, divisor);
      }
    }
  }

  // Whether a value of the thread's token r has to be looked into.
  KEEPSET_KERNEL_BODY bool IsSuspect(int r) const { return !(check_[r] == 0.0f); }

 private:
  float columns_[Tile::kRows];
  float check_[Tile::kRows] = {};
};

template <typename Tile, ColumnReduction kReduction, typename Simt>
KEEPSET_KERNEL_BODY inline void ReportSuspects(const Simt& simt, const WindowParams& p, int kv_head,
                                               int first_token,
                                               const ColumnSums<Tile, kReduction>& columns) {
  KEEPSET_UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    const int token = first_token + Tile::Row(simt.thread(), r);
    if (columns.IsSuspect(r) && token < p.k.num_tokens) ReportColumn(simt, p, kv_head, token);
  }
}

// References and limits of 64 query rows of one head from row `begin` on.
template <typename Simt>
KEEPSET_KERNEL_BODY inline void LoadRowInfo(const Simt& simt, const WindowParams& p, int head,
                                            int begin, float* references, int* limits) {
  for (int i = simt.thread(); i < kTileColumns; i += simt.num_threads()) {
    const bool is_used = begin + i < p.num_rows;
    references[i] = is_used ? p.references[static_cast<int64_t>(head) * p.num_rows + begin + i]
                            : FloatOfBits(0x7f800000u);
    limits[i] = is_used ? p.row_limits[begin + i] : -1;
  }
}

template <typename Simt>
KEEPSET_KERNEL_BODY inline void StoreValueNorms(const Simt& simt, const WindowParams& p,
                                                int kv_head, int begin, int count) {
  if (p.value_norms == nullptr) return;
  const int left = p.k.num_tokens - begin;
  const int64_t first_place = static_cast<int64_t>(kv_head) * p.k.num_tokens + begin;
  WarpRowNorms(simt, p.v, kv_head, begin, left < count ? left : count, first_place,
               p.value_norms + first_place, p.value_fault);
}

template <DType kType, ColumnReduction kReduction>
template <typename Simt>
KEEPSET_KERNEL_BODY void MmaColumns<kType, kReduction>::Run(const Simt& simt, const Params& p) {
  using Tile = MmaTile<kType>;
  const int pitch = Tile::PitchBytes(p.padded_dim);
  const int tile_tokens = Tile::kRowsPerWarp * simt.num_warps();
  const int first_token = simt.block_x() * tile_tokens;
  const int kv_head = p.first_kv_head + simt.block_y();
  std::byte* k_rows = simt.shared();
  std::byte* q_rows = k_rows + tile_tokens * pitch;  // two stages of kTileColumns rows
  auto* references = reinterpret_cast<float*>(q_rows + 2 * kTileColumns * pitch);  // two stages
  auto* limits = reinterpret_cast<int*>(references + 2 * kTileColumns);            // two stages

  const RowCopier copier(simt, p.k.head_dim, p.padded_dim);
  const std::byte* keys = p.k.data + kv_head * p.k.head_bytes;
  copier.Copy(simt, tile_tokens, k_rows, pitch, p.k.data, [&](int i) -> const std::byte* {
    return first_token + i < p.k.num_tokens ? keys + p.k.TokenOffset(first_token + i) : nullptr;
  });
  simt.CommitCopies();
  const auto load_queries = [&](int head, int begin, int stage) {
    const std::byte* rows = p.q + head * p.q_head_bytes;
    copier.Copy(simt, kTileColumns, q_rows + stage * kTileColumns * pitch, pitch, p.q,
                [&](int i) -> const std::byte* {
                  return begin + i < p.num_rows ? rows + (begin + i) * p.q_row_bytes : nullptr;
                });
    simt.CommitCopies();
    LoadRowInfo(simt, p, head, begin, references + stage * kTileColumns,
                limits + stage * kTileColumns);
  };
  const int end_head = (kv_head + 1) * p.group;
  int head = kv_head * p.group;
  int begin = 0;
  load_queries(head, begin, 0);
  // While the first tiles arrive.
  StoreValueNorms(simt, p, kv_head, first_token + simt.warp() * Tile::kRowsPerWarp,
                  Tile::kRowsPerWarp);

  const bool is_masked = first_token + tile_tokens - 1 > p.row_limits[0];
  ColumnSums<Tile, kReduction> columns;
  int stage = 0;
  while (head < end_head) {
    int next_head = head;
    int next_begin = begin + kTileColumns;
    if (next_begin >= p.num_rows) {
      ++next_head;
      next_begin = 0;
    }
    if (next_head < end_head) {
      load_queries(next_head, next_begin, stage ^ 1);
      simt.template WaitCopies<1>();
    } else {
      simt.template WaitCopies<0>();
    }
    simt.SyncBlock();
    const int used = p.num_rows - begin < kTileColumns ? p.num_rows - begin : kTileColumns;
    float logits[Tile::kRows][Tile::kColumns];
    Tile::Compute(simt, k_rows + simt.warp() * Tile::kRowsPerWarp * pitch,
                  q_rows + stage * kTileColumns * pitch, pitch, p.padded_dim, used, logits);
    columns.Add(simt, p.scale2, first_token, is_masked, references + stage * kTileColumns,
                limits + stage * kTileColumns, used, logits);
    if (next_head != head) {
      columns.Store(simt, first_token, p.k.num_tokens, p.divisor,
                    p.out + static_cast<int64_t>(head) * p.k.num_tokens);
      columns.Clear();
    }
    // The other stage is filled again in the next round.
    simt.SyncBlock();
    stage ^= 1;
    head = next_head;
    begin = next_begin;
  }
  ReportSuspects<Tile, kReduction>(simt, p, kv_head, first_token, columns);
}

template <ColumnReduction kReduction>
template <typename Simt>
KEEPSET_KERNEL_BODY void FmaColumns<kReduction>::Run(const Simt& simt, const Params& p) {
  using Tile = FmaTile;
  const int first_token = simt.block_x() * Tile::kTileRows;
  const int kv_head = p.first_kv_head + simt.block_y();
  auto* shared = reinterpret_cast<float*>(simt.shared());
  auto* references = reinterpret_cast<float*>(simt.shared() + Tile::kSharedBytes);
  auto* limits = reinterpret_cast<int*>(references + kTileColumns);
  constexpr int kTokensPerWarp = Tile::kTileRows / (Tile::kThreads / 32);
  StoreValueNorms(simt, p, kv_head, first_token + simt.warp() * kTokensPerWarp, kTokensPerWarp);

  const std::byte* keys = p.k.data + kv_head * p.k.head_bytes;
  const bool is_masked = first_token + Tile::kTileRows - 1 > p.row_limits[0];
  ColumnSums<Tile, kReduction> columns;
  for (int head = kv_head * p.group; head < (kv_head + 1) * p.group; ++head) {
    for (int begin = 0; begin < p.num_rows; begin += kTileColumns) {
      LoadRowInfo(simt, p, head, begin, references, limits);
      const std::byte* rows = p.q + head * p.q_head_bytes;
      float logits[Tile::kRows][Tile::kColumns];
      // Compute keeps the block in step before its first and after its last use of shared memory.
      Tile::Compute(
          simt, shared, p.k.head_dim, p.k.dtype,
          [&](int i) -> const std::byte* {
            const int token = first_token + i;
            return token < p.k.num_tokens ? keys + p.k.TokenOffset(token) : nullptr;
          },
          p.q_dtype,
          [&](int i) -> const std::byte* {
            return begin + i < p.num_rows ? rows + (begin + i) * p.q_row_bytes : nullptr;
          },
          logits);
      const int used = p.num_rows - begin < kTileColumns ? p.num_rows - begin : kTileColumns;
      columns.Add(simt, p.scale2, first_token, is_masked, references, limits, used, logits);
      simt.SyncBlock();
    }
    columns.Store(simt, first_token, p.k.num_tokens, p.divisor,
                  p.out + static_cast<int64_t>(head) * p.k.num_tokens);
    columns.Clear();
  }
  ReportSuspects<Tile, kReduction>(simt, p, kv_head, first_token, columns);
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_WINDOW_SCORES_KERNEL_H_
