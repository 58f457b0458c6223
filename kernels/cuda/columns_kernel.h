// Bodies of the kernels of window_scores.h that make the rows of the result.
#ifndef KEEPSET_KERNELS_CUDA_COLUMNS_KERNEL_H_
#define KEEPSET_KERNELS_CUDA_COLUMNS_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/column_inl.h"
#include "kernels/cuda/element.h"
#include "kernels/cuda/fault_code.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/logit_tiles.h"
#include "kernels/cuda/row_norm_inl.h"
#include "kernels/cuda/window_rows_inl.h"
#include "kernels/cuda/window_scores.h"

namespace keepset::kernels::cuda {

// Logits this far above a given log-sum-exp say that it is not the row's (limit of the CPU
// backend).
constexpr float kMostAboveLse = 126.0f;

constexpr int kNoToken = 0x7fffffff;

// Reports why the columns of `token` are not numbers, or too large, and returns whether it found
// that; a token that only rows which do not see it make suspicious has nothing to report. All 32
// lanes of the warp take part, of one token. Reads global memory element by element.
template <typename Simt>
KEEPSET_KERNEL_BODY inline bool ReportColumn(const Simt& simt, const WindowParams& p,
                                             const UnitOfBlock& at, int token) {
  const WindowLayer& layer = p.layers[at.layer];
  const std::byte* key = at.keys + at.k.TokenOffset(token);
  bool is_finite = true;
  for (int channel = simt.lane(); channel < at.k.head_dim; channel += 32) {
    is_finite = is_finite && IsFiniteValue(LoadElement(key, channel, at.k.dtype));
  }
  uint64_t code = kNoFault;
  if (simt.Ballot(!is_finite) != 0) {
    code =
        FaultCode(FaultKind::kKey, static_cast<int64_t>(at.unit.kv_head) * at.k.num_tokens + token);
    if (simt.lane() == 0) simt.MinGlobal(layer.fault, code);
    return true;
  }
  for (int i = simt.lane(); i < at.unit.num_rows; i += 32) {
    const int row = at.unit.first_row + i;
    if (token > p.rows[row].limit) continue;
    const std::byte* query = QueryRow(p, at.layer, row);
    float dot = 0.0f;
    for (int channel = 0; channel < at.k.head_dim; ++channel) {
      dot += LoadElement(query, channel, p.shape.q_dtype) * LoadElement(key, channel, at.k.dtype);
    }
    const int64_t place = PlaceOfRow(p, row);
    const float logit = dot * p.shape.scale2;
    const float reference = p.references[static_cast<int64_t>(at.layer) * p.num_rows + row];
    uint64_t found = kNoFault;
    if (!IsFiniteValue(logit)) {
      found = FaultCode(FaultKind::kLogit, place * at.k.num_tokens + token);
    } else if (layer.lse != nullptr && !(logit - reference < kMostAboveLse)) {
      found = FaultCode(FaultKind::kLseTooLow, place);
    }
    if (found < code) code = found;
  }
  if (code != kNoFault) simt.MinGlobal(layer.fault, code);
  return simt.Ballot(code != kNoFault) != 0;
}

// Reports the first token of a warp that has something to report: one value that is not a number
// can spoil every token, and an engine waits for this kernel. `token` of lanes that suspect none is
// kNoToken. All 32 lanes take part.
template <typename Simt>
KEEPSET_KERNEL_BODY inline void ReportFirstColumn(const Simt& simt, const WindowParams& p,
                                                  const UnitOfBlock& at, int token) {
  while (simt.Ballot(token != kNoToken) != 0) {
    // A row that is bad itself has been reported before this kernel began.
    if (*p.layers[at.layer].fault < FaultCode(FaultKind::kKey, 0)) return;
    int first = token;
    for (int mask = 1; mask < 32; mask *= 2) {
      const int other = simt.ShuffleXor(first, mask);
      if (other < first) first = other;
    }
    if (ReportColumn(simt, p, at, first)) return;
    if (token == first) token = kNoToken;
  }
}

// The columns that a thread accumulates: its tokens are the rows of the tile, query rows the
// columns.
template <typename Tile>
class ColumnSums {
 public:
  KEEPSET_KERNEL_BODY ColumnSums() { Clear(); }

  KEEPSET_KERNEL_BODY void Clear() {
    KEEPSET_UNROLL
    for (int r = 0; r < Tile::kRows; ++r) columns_[r] = 0.0f;
  }

  // references, limits: of the 64 query rows in shared memory; +inf for rows past the last, of
  // which the probability is then 0.
  template <ColumnReduction kReduction, typename Simt>
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
        checks_[r].SeeLogit(logits[r][c]);
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

  // Joins the lanes that share tokens, and stores one row of the result.
  template <typename Simt>
  KEEPSET_KERNEL_BODY void Store(const Simt& simt, int first_token, int num_tokens,
                                 const WindowOutput& output, float* out) {
    KEEPSET_UNROLL
    for (int r = 0; r < Tile::kRows; ++r) {
      const float column = JoinLaneColumns<Tile::kLanesPerRow>(
          simt, columns_[r], output.reduction == ColumnReduction::kMax);
      checks_[r].SeeColumn(column);
      const int token = first_token + Tile::Row(simt.thread(), r);
      if ((simt.lane() & (Tile::kLanesPerRow - 1)) == 0 && token < num_tokens) {
        out[token] = simt.Div(column, output.divisor);
      }
    }
  }

  // Whether a value of the thread's token r has to be looked into.
  KEEPSET_KERNEL_BODY bool IsSuspect(int r) const { return checks_[r].IsSuspect(); }

 private:
  float columns_[Tile::kRows];
  ColumnCheck checks_[Tile::kRows];
};

template <typename Tile, typename Simt>
KEEPSET_KERNEL_BODY inline void AddColumns(const Simt& simt, const WindowParams& p,
                                           const WindowOutput& output, int first_token,
                                           bool is_masked, const float* references,
                                           const int* limits, int num_rows,
                                           const float (&logits)[Tile::kRows][Tile::kColumns],
                                           ColumnSums<Tile>* columns) {
  // The same for all threads of the block.
  if (output.reduction == ColumnReduction::kMax) {
    columns->template Add<ColumnReduction::kMax>(simt, p.shape.scale2, first_token, is_masked,
                                                 references, limits, num_rows, logits);
  } else {
    columns->template Add<ColumnReduction::kSum>(simt, p.shape.scale2, first_token, is_masked,
                                                 references, limits, num_rows, logits);
  }
}

template <typename Tile, typename Simt>
KEEPSET_KERNEL_BODY inline void ReportSuspects(const Simt& simt, const WindowParams& p,
                                               const UnitOfBlock& at, int first_token,
                                               const ColumnSums<Tile>& columns) {
  KEEPSET_UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    const int token = first_token + Tile::Row(simt.thread(), r);
    const bool is_suspect = columns.IsSuspect(r) && token < at.k.num_tokens;
    ReportFirstColumn(simt, p, at, is_suspect ? token : kNoToken);
  }
}

// References and limits of 64 rows of an output from row `begin` on.
template <typename Simt>
KEEPSET_KERNEL_BODY inline void LoadRowInfo(const Simt& simt, const WindowParams& p, int layer,
                                            const WindowOutput& output, int begin,
                                            float* references, int* limits) {
  const float* of_layer = p.references + static_cast<int64_t>(layer) * p.num_rows;
  for (int i = simt.thread(); i < kTileColumns; i += simt.num_threads()) {
    const bool is_used = begin + i < output.num_rows;
    const int row = output.first_row + begin + i;
    references[i] = is_used ? of_layer[row] : FloatOfBits(0x7f800000u);
    limits[i] = is_used ? p.rows[row].limit : -1;
  }
}

template <typename Simt>
KEEPSET_KERNEL_BODY inline void StoreValueNorms(const Simt& simt, const WindowParams& p,
                                                const UnitOfBlock& at, int begin, int count) {
  const WindowLayer& layer = p.layers[at.layer];
  if (layer.value_norms == nullptr) return;
  DeviceRows v = p.shape.v;
  v.data = layer.v;
  v.block_table = layer.v_table;
  const int left = at.k.num_tokens - begin;
  const int64_t first_place = static_cast<int64_t>(at.unit.kv_head) * at.k.num_tokens + begin;
  WarpRowNorms(simt, v, at.unit.kv_head, begin, left < count ? left : count, first_place,
               layer.value_norms + first_place, layer.value_fault);
}

template <DType kType>
template <typename Simt>
KEEPSET_KERNEL_BODY void MmaColumns<kType>::Run(const Simt& simt, const Params& p) {
  using Tile = MmaTile<kType>;
  const UnitOfBlock at = FindUnit(p, simt.block_y());
  const int pitch = Tile::PitchBytes(p.shape.padded_dim);
  const int tile_tokens = Tile::kRowsPerWarp * simt.num_warps();
  const int first_token = simt.block_x() * tile_tokens;
  std::byte* k_rows = simt.shared();
  std::byte* q_rows = k_rows + tile_tokens * pitch;  // two stages of kTileColumns rows
  auto* references = reinterpret_cast<float*>(q_rows + 2 * kTileColumns * pitch);  // two stages
  auto* limits = reinterpret_cast<int*>(references + 2 * kTileColumns);            // two stages

  const RowCopier copier(simt, at.k.head_dim, p.shape.padded_dim);
  copier.Copy(simt, tile_tokens, k_rows, pitch, at.k.data, [&](int i) -> const std::byte* {
    return first_token + i < at.k.num_tokens ? at.keys + at.k.TokenOffset(first_token + i)
                                             : nullptr;
  });
  simt.CommitCopies();
  const auto load_queries = [&](const WindowOutput& output, int begin, int stage) {
    copier.Copy(simt, kTileColumns, q_rows + stage * kTileColumns * pitch, pitch,
                p.layers[at.layer].q, [&](int i) -> const std::byte* {
                  return begin + i < output.num_rows
                             ? QueryRow(p, at.layer, output.first_row + begin + i)
                             : nullptr;
                });
    simt.CommitCopies();
    LoadRowInfo(simt, p, at.layer, output, begin, references + stage * kTileColumns,
                limits + stage * kTileColumns);
  };
  const WindowOutput* next_output = p.outputs + at.unit.first_output;
  const WindowOutput* const end_output = next_output + at.unit.num_outputs;
  WindowOutput output = *next_output;
  int begin = 0;
  load_queries(output, begin, 0);
  // While the first tiles arrive.
  StoreValueNorms(simt, p, at, first_token + simt.warp() * Tile::kRowsPerWarp, Tile::kRowsPerWarp);

  const bool is_masked = first_token + tile_tokens - 1 > at.unit.smallest_limit;
  ColumnSums<Tile> columns;
  int stage = 0;
  while (true) {
    WindowOutput next = output;
    int next_begin = begin + kTileColumns;
    const bool is_last_tile = next_begin >= output.num_rows;
    if (is_last_tile) {
      ++next_output;
      next_begin = 0;
      if (next_output != end_output) next = *next_output;
    }
    if (next_output != end_output) {
      load_queries(next, next_begin, stage ^ 1);
      simt.template WaitCopies<1>();
    } else {
      simt.template WaitCopies<0>();
    }
    simt.SyncBlock();
    const int left = output.num_rows - begin;
    const int used = left < kTileColumns ? left : kTileColumns;
    float logits[Tile::kRows][Tile::kColumns];
    Tile::Compute(simt, k_rows + simt.warp() * Tile::kRowsPerWarp * pitch,
                  q_rows + stage * kTileColumns * pitch, pitch, p.shape.padded_dim, used, logits);
    AddColumns<Tile>(simt, p, output, first_token, is_masked, references + stage * kTileColumns,
                     limits + stage * kTileColumns, used, logits, &columns);
    if (is_last_tile) {
      columns.Store(
          simt, first_token, at.k.num_tokens, output,
          p.layers[at.layer].out + static_cast<int64_t>(output.out_row) * at.k.num_tokens);
      columns.Clear();
    }
    // The other stage is filled again in the next round.
    simt.SyncBlock();
    if (next_output == end_output) break;
    stage ^= 1;
    output = next;
    begin = next_begin;
  }
  ReportSuspects<Tile>(simt, p, at, first_token, columns);
}

template <typename Simt>
KEEPSET_KERNEL_BODY void FmaColumns::Run(const Simt& simt, const Params& p) {
  using Tile = FmaTile;
  const UnitOfBlock at = FindUnit(p, simt.block_y());
  const int first_token = simt.block_x() * Tile::kTileRows;
  auto* shared = reinterpret_cast<float*>(simt.shared());
  auto* references = reinterpret_cast<float*>(simt.shared() + Tile::kSharedBytes);
  auto* limits = reinterpret_cast<int*>(references + kTileColumns);
  constexpr int kTokensPerWarp = Tile::kTileRows / (Tile::kThreads / 32);
  StoreValueNorms(simt, p, at, first_token + simt.warp() * kTokensPerWarp, kTokensPerWarp);

  const bool is_masked = first_token + Tile::kTileRows - 1 > at.unit.smallest_limit;
  ColumnSums<Tile> columns;
  for (int j = 0; j < at.unit.num_outputs; ++j) {
    const WindowOutput output = p.outputs[at.unit.first_output + j];
    for (int begin = 0; begin < output.num_rows; begin += kTileColumns) {
      LoadRowInfo(simt, p, at.layer, output, begin, references, limits);
      float logits[Tile::kRows][Tile::kColumns];
      // Compute keeps the block in step before its first and after its last use of shared memory.
      Tile::Compute(
          simt, shared, at.k.head_dim, at.k.dtype,
          [&](int i) -> const std::byte* {
            const int token = first_token + i;
            return token < at.k.num_tokens ? at.keys + at.k.TokenOffset(token) : nullptr;
          },
          p.shape.q_dtype,
          [&](int i) -> const std::byte* {
            return begin + i < output.num_rows ? QueryRow(p, at.layer, output.first_row + begin + i)
                                               : nullptr;
          },
          logits);
      const int left = output.num_rows - begin;
      AddColumns<Tile>(simt, p, output, first_token, is_masked, references, limits,
                       left < kTileColumns ? left : kTileColumns, logits, &columns);
      simt.SyncBlock();
    }
    columns.Store(simt, first_token, at.k.num_tokens, output,
                  p.layers[at.layer].out + static_cast<int64_t>(output.out_row) * at.k.num_tokens);
    columns.Clear();
  }
  ReportSuspects<Tile>(simt, p, at, first_token, columns);
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_COLUMNS_KERNEL_H_
