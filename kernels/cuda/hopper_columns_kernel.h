// Body of HopperColumns: tokens are the rows of the products, query rows their columns. A thread
// holds two tokens and a quarter of the query rows, so that a column of the result is a sum in
// registers and two shuffles.
#ifndef KEEPSET_KERNELS_CUDA_HOPPER_COLUMNS_KERNEL_H_
#define KEEPSET_KERNELS_CUDA_HOPPER_COLUMNS_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/columns_kernel.h"
#include "kernels/cuda/element.h"
#include "kernels/cuda/hopper_epilogue_inl.h"
#include "kernels/cuda/hopper_norms_inl.h"
#include "kernels/cuda/hopper_pipeline_inl.h"
#include "kernels/cuda/hopper_segment_inl.h"
#include "kernels/cuda/hopper_window.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/window_rows_inl.h"

namespace keepset::kernels::cuda {

// The loading warp's share of a block's tiles.
template <typename Simt>
KEEPSET_KERNEL_BODY inline void LoadRange(const Simt& simt, const HopperParams& p,
                                          const TaskRange& range, const KeyRing& ring) {
  StageCursor cursor;
  for (int64_t task = range.begin; task < range.end;) {
    const ColumnSegment segment = FindSegment(p, task, range.end);
    if (simt.lane() == 0) simt.PrefetchMap(p.key_maps[segment.at.layer]);
    KEEPSET_NO_UNROLL
    for (int i = 0; i < segment.num_tiles; ++i) {
      LoadKeys(simt, p, segment.at, (segment.first_tile + i) * kColumnTokens, kColumnTokens, ring,
               cursor);
      cursor.Advance(1, p.num_stages);
    }
    task += segment.num_tiles;
  }
}

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

template <DType kType, int kSlots>
template <typename Simt>
KEEPSET_KERNEL_BODY void HopperColumns<kType, kSlots>::Run(const Simt& simt, const Params& p) {
  const HopperLayout layout(p.keys.num_spans, p.num_slots, kColumnTokens, p.num_stages);
  std::byte* const shared = AlignedShared(simt);
  const KeyRing ring = MakeRing(simt, layout, shared, p.num_stages, kGroupWarps);
  const int group = simt.warp() / kGroupWarps - 1;
  if (group < 0) {
    simt.template ShrinkRegisters<kLoaderRegisters>();
    const TaskRange range = RangeOfBlock(simt, p.num_tasks);
    if (simt.warp() == 0) {
      LoadRange(simt, p, range, ring);
    } else {
      NormRange<kType>(simt, p, range, shared + layout.norms + (simt.warp() - 1) * kNormWarpBytes);
    }
    return;
  }

  simt.template GrowRegisters<kMathRegisters>();
  const TaskRange range = RangeOfBlock(simt, p.num_tasks);
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
    const ColumnKind kind_of_part =
        KindOfPart<kSlots>(targets, segment.part.num_outputs, ends, products);
    // The groups alternate, counted from the block's first tile; both count every pair.
    const auto first = static_cast<int>(segment.first_task - range.begin);
    const int last = first + segment.num_tiles - 1;
    for (int pair = first / kMathGroups; pair <= last / kMathGroups; ++pair) {
      const int count = pair * kMathGroups + group;
      const bool is_mine = count >= first && count <= last;
      const int first_token = (segment.first_tile + count - first) * kColumnTokens;
      const bool is_masked = first_token + kColumnTokens - 1 > at.unit.smallest_limit;
      const ColumnKind kind = is_masked ? ColumnKind::kMasked : kind_of_part;
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
        epilogue.Add(simt, p.window.shape.scale2, first_token + row, at.k.num_tokens, kind,
                     segment.part.num_slots - product * kSlots, references + product * kSlots,
                     limits + product * kSlots, ends[product], logits, &target);
      }
      if (!is_mine) continue;
      KEEPSET_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int token = first_token + row + 8 * r;
        const bool is_suspect = epilogue.TakeSuspicion(r) && token < at.k.num_tokens;
        ReportFirstColumn(simt, p.window, at, is_suspect ? token : kNoToken);
      }
    }
  }
  turns.End(simt);
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_HOPPER_COLUMNS_KERNEL_H_
