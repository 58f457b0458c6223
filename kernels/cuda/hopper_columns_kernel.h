// Body of HopperColumns: tokens are the rows of the products, query rows their columns. A thread
// holds two tokens and a quarter of the query rows, so that a column of the result is a sum in
// registers and two shuffles.
#ifndef KEEPSET_KERNELS_CUDA_HOPPER_COLUMNS_KERNEL_H_
#define KEEPSET_KERNELS_CUDA_HOPPER_COLUMNS_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/columns_kernel.h"
#include "kernels/cuda/element.h"
#include "kernels/cuda/hopper_pipeline_inl.h"
#include "kernels/cuda/hopper_window.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/row_norm_inl.h"
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

// Value norms of some tiles of a segment by one warp, with the bits of WarpRowNorms. Rows pass
// through shared memory, of which each lane reads what it copied itself, so that many are on their
// way.
class NormStream {
 public:
  // buffer: kNormWarpBytes of this warp.
  template <typename Simt>
  KEEPSET_KERNEL_BODY NormStream(const Simt& simt, const WindowParams& p,
                                 const ColumnSegment& segment, std::byte* buffer)
      : v_(p.shape.v),
        segment_(segment),
        buffer_(buffer + simt.lane() * 16),
        pieces_(static_cast<int>(PiecesPerRow(v_))),
        rows_at_once_(pieces_ > 0 && pieces_ < 32 ? 32 / pieces_ : 1),
        lane_row_(pieces_ > 0 ? simt.lane() / pieces_ : 0),
        lane_piece_(simt.lane() - lane_row_ * pieces_) {
    v_.data = p.layers[segment.at.layer].v;
    v_.block_table = p.layers[segment.at.layer].v_table;
  }

  // Tiles warp - 1, warp + 2, ... of the segment.
  template <typename Simt>
  KEEPSET_KERNEL_BODY void Run(const Simt& simt, const WindowParams& p) const {
    const int first = simt.warp() - 1;
    const int tiles = (segment_.num_tiles - first + kGroupWarps - 2) / (kGroupWarps - 1);
    if (!HasAlignedRows(v_) || pieces_ < 2 || pieces_ > 32 || (pieces_ & (pieces_ - 1)) != 0) {
      for (int i = 0; i < tiles; ++i) {
        Careful(simt, p, Token(simt, i), kColumnTokens);
      }
      return;
    }
    const int rows = kNormLoads * rows_at_once_;  // <= kColumnTokens
    const int batches = kColumnTokens / rows;
    const int count = tiles * batches;
    const auto token_of = [&](int batch) {
      const int tile = batch / batches;
      return Token(simt, tile) + (batch - tile * batches) * rows;
    };
    for (int batch = 0; batch < kNormDepth - 1; ++batch) {
      Copy(simt, batch < count ? token_of(batch) : v_.num_tokens, batch);
    }
    KEEPSET_NO_UNROLL
    for (int batch = 0; batch < count; ++batch) {
      const int next = batch + kNormDepth - 1;
      Copy(simt, next < count ? token_of(next) : v_.num_tokens, next);
      simt.template WaitCopies<kNormDepth - 1>();
      const int token = token_of(batch);
      if (!Sum(simt, p, token, batch)) Careful(simt, p, token, rows);
    }
  }

 private:
  template <typename Simt>
  KEEPSET_KERNEL_BODY int Token(const Simt& simt, int tile) const {
    return (segment_.first_tile + simt.warp() - 1 + tile * (kGroupWarps - 1)) * kColumnTokens;
  }
  KEEPSET_KERNEL_BODY std::byte* Buffer(int batch, int load) const {
    return buffer_ + ((batch & (kNormDepth - 1)) * kNormLoads + load) * 512;
  }
  KEEPSET_KERNEL_BODY float* Norms(const WindowParams& p) const {
    return p.layers[segment_.at.layer].value_norms + FirstPlace();
  }
  KEEPSET_KERNEL_BODY int64_t FirstPlace() const {
    return static_cast<int64_t>(segment_.at.unit.kv_head) * segment_.at.k.num_tokens;
  }

  template <typename Simt>
  KEEPSET_KERNEL_BODY void Copy(const Simt& simt, int token, int batch) const {
    KEEPSET_UNROLL
    for (int j = 0; j < kNormLoads; ++j) {
      const int row = token + j * rows_at_once_ + lane_row_;
      const bool is_used = row < v_.num_tokens;
      const std::byte* const from =
          is_used ? v_.Row(segment_.at.unit.kv_head, row) + lane_piece_ * 16 : v_.data;
      simt.CopyAsync16(Buffer(batch, j), from, is_used);
    }
    simt.CommitCopies();
  }

  // False when a norm is not finite.
  template <typename Simt>
  KEEPSET_KERNEL_BODY bool Sum(const Simt& simt, const WindowParams& p, int token,
                               int batch) const {
    bool is_finite = true;
    KEEPSET_UNROLL
    for (int j = 0; j < kNormLoads; ++j) {
      const Piece piece = *reinterpret_cast<const Piece*>(Buffer(batch, j));
      float sum = SumOfSquares<float>(piece, v_.dtype);
      for (int mask = pieces_ / 2; mask > 0; mask /= 2) sum += simt.ShuffleXor(sum, mask);
      const float norm = simt.Sqrt(sum);
      is_finite = is_finite && IsFiniteValue(norm);
      const int row = token + j * rows_at_once_ + lane_row_;
      if (row < v_.num_tokens && lane_piece_ == 0) Norms(p)[row] = norm;
    }
    return simt.Ballot(!is_finite) == 0;
  }

  template <typename Simt>
  KEEPSET_KERNEL_BODY void Careful(const Simt& simt, const WindowParams& p, int token,
                                   int rows) const {
    const int left = v_.num_tokens - token;
    WarpRowNorms(simt, v_, segment_.at.unit.kv_head, token, left < rows ? left : rows,
                 FirstPlace() + token, Norms(p) + token, p.layers[segment_.at.layer].value_fault);
  }

  DeviceRows v_;
  const ColumnSegment& segment_;
  std::byte* buffer_;
  int pieces_;
  int rows_at_once_;
  int lane_row_;
  int lane_piece_;
};

// The loading warp's share of a block's tiles.
template <typename Simt>
KEEPSET_KERNEL_BODY inline void LoadRange(const Simt& simt, const HopperParams& p,
                                          const TaskRange& range, const KeyRing& ring) {
  StageCursor cursor;
  for (int64_t task = range.begin; task < range.end;) {
    const ColumnSegment segment = FindSegment(p, task, range.end);
    KEEPSET_NO_UNROLL
    for (int i = 0; i < segment.num_tiles; ++i) {
      LoadKeys(simt, p, segment.at, (segment.first_tile + i) * kColumnTokens, kColumnTokens, ring,
               cursor);
      cursor.Advance(1, p.num_stages);
    }
    task += segment.num_tiles;
  }
}

// That of the other warps of its group, which take tiles in turns.
template <typename Simt>
KEEPSET_KERNEL_BODY inline void NormRange(const Simt& simt, const HopperParams& p,
                                          const TaskRange& range, std::byte* buffer) {
  for (int64_t task = range.begin; task < range.end;) {
    const ColumnSegment segment = FindSegment(p, task, range.end);
    task += segment.num_tiles;
    if (segment.part.is_first == 0 || p.window.layers[segment.at.layer].value_norms == nullptr) {
      continue;
    }
    NormStream(simt, p.window, segment, buffer).Run(simt, p.window);
  }
}

// Slots between two places where plain outputs may end.
constexpr int kPlainSlots = 32;

// What a thread adds up: two tokens, 8 rows of the tile apart.
template <int kSlots>
class ColumnEpilogue {
 public:
  // One product: `logits` of slots first_slot to first_slot + kSlots. `target` is that of the
  // output that the first slot belongs to. is_plain: no token of the tile is masked for any row, no
  // output is a maximum, and outputs end at multiples of kPlainSlots.
  template <typename Simt>
  KEEPSET_KERNEL_BODY void Add(const Simt& simt, float scale2, int token, int num_tokens,
                               bool is_plain, int used_slots, const float* references,
                               const int* limits, uint32_t ends, const float (&logits)[kSlots / 2],
                               const ColumnTarget** target) {
    const int first_column = (simt.lane() & 3) * 2;
    references += first_column;
    limits += first_column;
    if (is_plain) {
      // Long stretches without a branch: exponentials are queued while others are on their way.
      KEEPSET_UNROLL
      for (int slot = 0; slot < kSlots; slot += kPlainSlots) {
        if (slot >= used_slots) break;
        AddPlain(simt, scale2, references + slot, logits, slot / kSlotGroup);
        if (((ends >> (slot / kSlotGroup + kPlainSlots / kSlotGroup - 1)) & 1u) != 0) {
          Store(simt, token, num_tokens, **target);
          ++*target;
        }
      }
      return;
    }
    KEEPSET_UNROLL
    for (int group = 0; group < kSlots / kSlotGroup; ++group) {
      if (group * kSlotGroup >= used_slots) break;
      AddGroup(simt, scale2, token, references + group * kSlotGroup, limits + group * kSlotGroup,
               (*target)->is_max != 0, logits, group);
      if (((ends >> group) & 1u) != 0) {
        Store(simt, token, num_tokens, **target);
        ++*target;
      }
    }
  }

  // Whether a value of the tile's token r has to be looked into; forgets it.
  KEEPSET_KERNEL_BODY bool TakeSuspicion(int r) {
    const bool is_suspect = !(check_[r] == 0.0f);
    check_[r] = 0.0f;
    return is_suspect;
  }

 private:
  template <typename Simt>
  KEEPSET_KERNEL_BODY void AddPlain(const Simt& simt, float scale2, const float* references,
                                    const float (&logits)[kSlots / 2], int first_group) {
    KEEPSET_UNROLL
    for (int group = 0; group < kPlainSlots / kSlotGroup; ++group) {
      KEEPSET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float reference = references[group * kSlotGroup + i];
        KEEPSET_UNROLL
        for (int r = 0; r < 2; ++r) {
          const float logit = logits[4 * (first_group + group) + 2 * r + i];
          // Of every token, seen or not: a key that is not finite makes all its logits so.
          check_[r] += logit * 0.0f;
          columns_[r] += simt.Exp2(logit * scale2 - reference);
        }
      }
    }
  }

  template <typename Simt>
  KEEPSET_KERNEL_BODY void AddGroup(const Simt& simt, float scale2, int token,
                                    const float* references, const int* limits, bool is_max,
                                    const float (&logits)[kSlots / 2], int group) {
    KEEPSET_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float reference = references[i];
      const int limit = limits[i];
      KEEPSET_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float logit = logits[4 * group + 2 * r + i];
        check_[r] += logit * 0.0f;
        float p = simt.Exp2(logit * scale2 - reference);
        if (token + 8 * r > limit) p = 0.0f;
        columns_[r] = is_max ? simt.Max(columns_[r], p) : columns_[r] + p;
      }
    }
  }

  // Joins the lanes that share tokens, and begins anew.
  template <typename Simt>
  KEEPSET_KERNEL_BODY void Store(const Simt& simt, int token, int num_tokens,
                                 const ColumnTarget& target) {
    KEEPSET_UNROLL
    for (int r = 0; r < 2; ++r) {
      float column = columns_[r];
      KEEPSET_UNROLL
      for (int mask = 1; mask < 4; mask *= 2) {
        const float other = simt.ShuffleXor(column, mask);
        column = target.is_max != 0 ? simt.Max(column, other) : column + other;
      }
      // NaN, too, is not below the limit.
      if (!(column < kMostColumn)) check_[r] = column - column + 1.0f;
      if ((simt.lane() & 3) == 0 && token + 8 * r < num_tokens) {
        target.out[token + 8 * r] = simt.Div(column, target.divisor);
      }
      columns_[r] = 0.0f;
    }
  }

  float columns_[2] = {0.0f, 0.0f};
  float check_[2] = {0.0f, 0.0f};
};

// The slots of a part in shared memory: rows, references and limits of each, and where the outputs
// end. Ends with the queries in place and the math groups in step.
template <int kSlots, typename Simt>
KEEPSET_KERNEL_BODY inline void LoadPart(const Simt& simt, const HopperParams& p,
                                         const ColumnSegment& segment, int math_thread,
                                         const HopperLayout& layout, std::byte* shared) {
  const WindowParams& window = p.window;
  const WindowLayer& layer = window.layers[segment.at.layer];
  const float* const of_layer =
      window.references + static_cast<int64_t>(segment.at.layer) * window.num_rows;
  auto* const references = reinterpret_cast<float*>(shared + layout.references);
  auto* const limits = reinterpret_cast<int*>(shared + layout.limits);
  auto* const rows = reinterpret_cast<int*>(shared + layout.rows);
  auto* const targets = reinterpret_cast<ColumnTarget*>(shared + layout.targets);
  auto* const ends = reinterpret_cast<uint32_t*>(shared + layout.ends);
  // The part before has been used up.
  simt.SyncNamed(kQueriesBarrier, kMathThreads);
  const auto set_slot = [&](int slot, int row) {
    rows[slot] = row;
    references[slot] = row >= 0 ? of_layer[row] : FloatOfBits(0x7f800000u);
    limits[slot] = row >= 0 ? window.rows[row].limit : -1;
  };
  uint32_t my_ends = 0;
  int slot = 0;
  for (int j = 0; j < segment.part.num_outputs; ++j) {
    const WindowOutput output = window.outputs[segment.part.first_output + j];
    const int slots = (output.num_rows + kSlotGroup - 1) / kSlotGroup * kSlotGroup;
    for (int i = math_thread; i < slots; i += kMathThreads) {
      set_slot(slot + i, i < output.num_rows ? output.first_row + i : -1);
    }
    slot += slots;
    const int last = slot - 1;
    if (last / kSlots == math_thread) my_ends |= 1u << (last % kSlots / kSlotGroup);
    if (math_thread == 0) {
      targets[j] = {layer.out + static_cast<int64_t>(output.out_row) * segment.at.k.num_tokens,
                    output.divisor, output.reduction == ColumnReduction::kMax ? 1 : 0};
    }
  }
  const int padded = (slot + kSlots - 1) / kSlots * kSlots;
  for (int i = slot + math_thread; i < padded; i += kMathThreads) set_slot(i, -1);
  if (math_thread < padded / kSlots) ends[math_thread] = my_ends;
  simt.SyncNamed(kQueriesBarrier, kMathThreads);
  LoadQueries(simt, math_thread, p.keys.num_spans, segment.at.k.head_dim, p.num_slots, padded,
              shared, layer.q, [&](int i) -> const std::byte* {
                return rows[i] >= 0 ? QueryRow(window, segment.at.layer, rows[i]) : nullptr;
              });
  simt.SyncNamed(kQueriesBarrier, kMathThreads);
}

// Whether the outputs of a part are sums that end at multiples of kPlainSlots.
KEEPSET_KERNEL_BODY inline bool IsPlainPart(const ColumnTarget* targets, int num_outputs,
                                            const uint32_t* ends, int products) {
  constexpr uint32_t kPlainEnds = 0x88888888u;
  bool is_plain = true;
  for (int j = 0; j < num_outputs; ++j) is_plain = is_plain && targets[j].is_max == 0;
  for (int j = 0; j < products; ++j) is_plain = is_plain && (ends[j] & ~kPlainEnds) == 0;
  return is_plain;
}

template <DType kType, int kSlots>
template <typename Simt>
KEEPSET_KERNEL_BODY void HopperColumns<kType, kSlots>::Run(const Simt& simt, const Params& p) {
  const HopperLayout layout(p.keys.num_spans, p.num_slots, kColumnTokens, p.num_stages);
  std::byte* const shared = AlignedShared(simt);
  const KeyRing ring = MakeRing(simt, layout, shared, p.num_stages, kGroupWarps);
  const TaskRange range = RangeOfBlock(simt, p.num_tasks);
  const int group = simt.warp() / kGroupWarps - 1;
  if (group < 0) {
    simt.template ShrinkRegisters<kLoaderRegisters>();
    if (simt.warp() == 0) {
      LoadRange(simt, p, range, ring);
    } else {
      NormRange(simt, p, range, shared + layout.norms + (simt.warp() - 1) * kNormWarpBytes);
    }
    return;
  }

  simt.template GrowRegisters<kMathRegisters>();
  const int math_thread = simt.thread() - kGroupThreads;
  const auto* const references = reinterpret_cast<const float*>(shared + layout.references);
  const auto* const limits = reinterpret_cast<const int*>(shared + layout.limits);
  const auto* const targets = reinterpret_cast<const ColumnTarget*>(shared + layout.targets);
  const auto* const ends = reinterpret_cast<const uint32_t*>(shared + layout.ends);
  // Of the tile: rows of a warp, of a lane.
  const int row = (simt.warp() % kGroupWarps) * 16 + (simt.lane() >> 2);
  const Turns turns(simt, group);
  StageCursor cursor;
  cursor.Advance(group, p.num_stages);
  ColumnEpilogue<kSlots> epilogue;
  for (int64_t task = range.begin; task < range.end;) {
    const ColumnSegment segment = FindSegment(p, task, range.end);
    const UnitOfBlock& at = segment.at;
    task += segment.num_tiles;
    LoadPart<kSlots>(simt, p, segment, math_thread, layout, shared);
    const int products = (segment.part.num_slots + kSlots - 1) / kSlots;
    const bool is_plain_part = IsPlainPart(targets, segment.part.num_outputs, ends, products);
    // The groups alternate, counted from the block's first tile; both count every pair.
    const auto first = static_cast<int>(segment.first_task - range.begin);
    const int last = first + segment.num_tiles - 1;
    for (int pair = first / kMathGroups; pair <= last / kMathGroups; ++pair) {
      const int count = pair * kMathGroups + group;
      const bool is_mine = count >= first && count <= last;
      const int first_token = (segment.first_tile + count - first) * kColumnTokens;
      const bool is_plain =
          is_plain_part && first_token + kColumnTokens - 1 <= at.unit.smallest_limit;
      const ColumnTarget* target = targets;
      for (int product = 0; product < products; ++product) {
        if (!is_mine) {
          turns.Take(simt);
          turns.Give(simt);
          continue;
        }
        if (product == 0) simt.WaitPhase(ring.full + cursor.stage(), cursor.parity());
        turns.Take(simt);
        float logits[kSlots / 2];
        QueueProduct<kType, kSlots>(simt, ring.Stage(cursor), kColumnTokens,
                                    shared + product * kSlots * kSpanBytes, p.num_slots,
                                    p.keys.num_spans, logits);
        turns.Give(simt);
        simt.WaitMma(logits);
        if (product == products - 1) {
          if (simt.lane() == 0) simt.Arrive(ring.empty + cursor.stage());
          cursor.Advance(kMathGroups, p.num_stages);
        }
        epilogue.Add(simt, p.window.shape.scale2, first_token + row, at.k.num_tokens, is_plain,
                     segment.part.num_slots - product * kSlots, references + product * kSlots,
                     limits + product * kSlots, ends[product], logits, &target);
      }
      if (!is_mine) continue;
      KEEPSET_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int token = first_token + row + 8 * r;
        if (epilogue.TakeSuspicion(r) && token < at.k.num_tokens) {
          ReportColumn(simt, p.window, at, token);
        }
      }
    }
  }
  turns.End(simt);
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_HOPPER_COLUMNS_KERNEL_H_
