// What the kernels of hopper_window.h share: shared memory, the ring of key stages, descriptors of
// wgmma operands, and query rows in swizzled spans.
#ifndef KEEPSET_KERNELS_CUDA_HOPPER_PIPELINE_INL_H_
#define KEEPSET_KERNELS_CUDA_HOPPER_PIPELINE_INL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/hopper_window.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/window_rows_inl.h"

namespace keepset::kernels::cuda {

constexpr int kGroupThreads = 128;
constexpr int kGroupWarps = 4;
constexpr int kMathGroups = 2;
constexpr int kMathThreads = kMathGroups * kGroupThreads;
// Registers of a thread: (kLoaderRegisters + 2 kMathRegisters) * 128 of 65,536.
constexpr int kLoaderRegisters = 72;
constexpr int kMathRegisters = 216;

// Named barriers.
constexpr int kTurnBarrier = 1;  // and the next one: a group's turn at the tensor cores
constexpr int kQueriesBarrier = 3;

constexpr int kSlotGroup = 8;  // columns of an accumulator that are of one output

// Value rows on their way: batches of so many pieces of 16 bytes for each lane.
constexpr int kNormLoads = 8;
constexpr int kNormDepth = 2;
constexpr int kNormWarpBytes = kNormLoads * kNormDepth * 32 * 16;

// One row of the result, as the epilogue stores it.
struct ColumnTarget {
  float* out;
  float divisor;
  int32_t is_max;
};

// Bytes of shared memory from its first multiple of kSwizzleBytes on.
struct HopperLayout {
  int32_t query_bytes;
  int32_t stage_bytes;
  int32_t barriers;    // full and empty of each stage
  int32_t norms;       // of Columns, as what follows; here RowStats ends
  int32_t references;  // [slots]
  int32_t limits;      // [slots]
  int32_t rows;        // [slots], of the list; -1 where there is none
  int32_t targets;     // [slots / kSlotGroup]
  int32_t ends;        // [slots / 64], bit per slot group: the last of its output
  int32_t end;

  KEEPSET_HD HopperLayout(int spans, int slots, int tile_tokens, int stages)
      : query_bytes(spans * slots * kSpanBytes),
        stage_bytes(spans * tile_tokens * kSpanBytes),
        barriers(query_bytes + stages * stage_bytes),
        norms(barriers + kMaxStages * 2 * 8),
        references(norms + (kGroupWarps - 1) * kNormWarpBytes),
        limits(references + slots * 4),
        rows(limits + slots * 4),
        targets(rows + slots * 4),
        ends(targets + slots / kSlotGroup * 16),
        end(ends + slots / 64 * 4) {}
};
static_assert(sizeof(ColumnTarget) == 16);

// To the first multiple of kSwizzleBytes of the shared window.
template <typename Simt>
KEEPSET_KERNEL_BODY inline std::byte* AlignedShared(const Simt& simt) {
  std::byte* const shared = simt.shared();
  return shared + ((kSwizzleBytes - simt.SharedAddress(shared)) & (kSwizzleBytes - 1));
}

// A place in the ring of stages, and the parity of the phase that it is in.
class StageCursor {
 public:
  KEEPSET_KERNEL_BODY int stage() const { return stage_; }
  KEEPSET_KERNEL_BODY uint32_t parity() const { return parity_; }
  // count <= num_stages
  KEEPSET_KERNEL_BODY void Advance(int count, int num_stages) {
    stage_ += count;
    if (stage_ < num_stages) return;
    stage_ -= num_stages;
    parity_ ^= 1;
  }

 private:
  int stage_ = 0;
  uint32_t parity_ = 0;
};

// Keys on their way: TMA fills a stage, the groups that read it say when it is free.
struct KeyRing {
  uint64_t* full;
  uint64_t* empty;
  std::byte* stages;
  int num_stages;
  int stage_bytes;

  KEEPSET_KERNEL_BODY std::byte* Stage(const StageCursor& at) const {
    return stages + at.stage() * stage_bytes;
  }
};

// readers: warps that say a stage is free.
template <typename Simt>
KEEPSET_KERNEL_BODY inline KeyRing MakeRing(const Simt& simt, const HopperLayout& layout,
                                            std::byte* shared, int num_stages, int readers) {
  auto* const barriers = reinterpret_cast<uint64_t*>(shared + layout.barriers);
  const KeyRing ring = {barriers, barriers + kMaxStages, shared + layout.query_bytes, num_stages,
                        layout.stage_bytes};
  if (simt.thread() == 0) {
    for (int i = 0; i < num_stages; ++i) {
      simt.InitBarrier(ring.full + i, 1);
      simt.InitBarrier(ring.empty + i, readers);
    }
    simt.FenceBarriers();
  }
  simt.SyncBlock();
  return ring;
}

// The loading warp: `tokens` tokens from `first` on into the next stage. A lane takes a box, and
// loads each of its spans.
template <typename Simt>
KEEPSET_KERNEL_BODY inline void LoadKeys(const Simt& simt, const HopperParams& p,
                                         const UnitOfBlock& at, int first, int tokens,
                                         const KeyRing& ring, const StageCursor& cursor) {
  const HopperKeys& keys = p.keys;
  const int left = at.k.num_tokens - first;
  const int used = left < tokens ? left : tokens;
  const int boxes = (used + keys.box_tokens - 1) / keys.box_tokens;
  const CUtensorMap& map = p.key_maps[at.layer];
  uint64_t* const full = ring.full + cursor.stage();
  std::byte* const stage = ring.Stage(cursor);
  simt.WaitPhase(ring.empty + cursor.stage(), cursor.parity() ^ 1);
  // A lane without a load of its own waits for a parity, which is the same again two phases later:
  // no lane runs ahead of another that has not seen this phase yet.
  simt.SyncWarp();
  if (simt.lane() == 0) {
    simt.ArriveAndExpect(full, boxes * keys.num_spans * keys.box_tokens * kSpanBytes);
  }
  for (int box = simt.lane(); box < boxes; box += 32) {
    const int token = first + box * keys.box_tokens;
    std::byte* to = stage + box * keys.box_tokens * kSpanBytes;
    if (keys.block_dim == 0) {
      const bool token_first = keys.token_dim == 1;
      for (int span = 0; span < keys.num_spans; ++span, to += tokens * kSpanBytes) {
        simt.LoadBox(to, map, span * kSpanChannels, token_first ? token : at.unit.kv_head,
                     token_first ? at.unit.kv_head : token, full);
      }
      continue;
    }
    const uint32_t block = at.k.block_size.Quotient(static_cast<uint32_t>(token));
    const int place =
        static_cast<int>(at.k.block_size.Remainder(static_cast<uint32_t>(token), block));
    const int block_id = at.k.block_table[block];
    int c[3];
    KEEPSET_UNROLL
    for (int dim = 1; dim <= 3; ++dim) {
      c[dim - 1] = dim == keys.token_dim  ? place
                   : dim == keys.head_dim ? at.unit.kv_head
                                          : block_id;
    }
    for (int span = 0; span < keys.num_spans; ++span, to += tokens * kSpanBytes) {
      simt.LoadBox(to, map, span * kSpanChannels, c[0], c[1], c[2], full);
    }
  }
}

// Query rows into slots by the threads of the math groups; row(i) points at the row of slot i, or
// is null where it is zeros. Before and after it the groups meet.
template <typename Simt, typename RowPointer>
KEEPSET_KERNEL_BODY inline void LoadQueries(const Simt& simt, int math_thread, int num_spans,
                                            int head_dim, int num_slots, int used_slots,
                                            std::byte* queries, const std::byte* anywhere,
                                            RowPointer row) {
  constexpr int kSpanPieces = kSpanBytes / 16;
  const int pieces = num_spans * kSpanPieces;
  for (int i = math_thread; i < used_slots * pieces; i += kMathThreads) {
    const int slot = i / pieces;
    const int piece = i - slot * pieces;
    const int span = piece / kSpanPieces;
    // The swizzle of TMA: pieces of a row change places by the row's number.
    const int place = (piece & (kSpanPieces - 1)) ^ (slot & 7);
    const std::byte* const from = row(slot);
    const bool is_used = from != nullptr && piece * 8 < head_dim;
    simt.CopyAsync16(queries + (span * num_slots + slot) * kSpanBytes + place * 16,
                     is_used ? from + piece * 16 : anywhere, is_used);
  }
  simt.CommitCopies();
  simt.template WaitCopies<0>();
  simt.FenceAsyncProxy();
}

// Descriptor of rows of 128 bytes in the 128-byte swizzle, K-major: start address and the distance
// of groups of eight rows in units of 16 bytes (bits 0-13 and 32-45; the leading offset, bits
// 16-29, does not matter in this mode), base offset 0 (bits 49-51: patterns begin at multiples of
// 1024), mode 1 (bits 62-63).
template <typename Simt>
KEEPSET_KERNEL_BODY inline uint64_t OperandDescriptor(const Simt& simt, const std::byte* rows) {
  constexpr uint64_t kMode =
      (uint64_t{1} << 62) | (uint64_t{kSwizzleBytes >> 4} << 32) | (uint64_t{1} << 16);
  return kMode | (simt.SharedAddress(rows) >> 4);
}

// d = a b^T over all channels: 64 rows of `a` (of a_rows in each span) and kColumns of `b`. Queued,
// not waited for. kSpans: num_spans, or 0 for any number; without a loop the accumulators stay
// where they are from product to product.
template <DType kType, int kColumns, int kSpans, typename Simt>
KEEPSET_KERNEL_BODY inline void QueueSpans(const Simt& simt, uint64_t a, uint64_t a_span,
                                           uint64_t b, uint64_t b_span, int num_spans,
                                           float (&d)[kColumns / 2]) {
  constexpr int kStepUnits = 2;  // 16 channels: 32 bytes
  const auto add_span = [&](int span) {
    KEEPSET_UNROLL
    for (int step = 0; step < kSpanChannels / 16; ++step) {
      simt.template MmaAsync<kType, kColumns>(d, a + step * kStepUnits, b + step * kStepUnits,
                                              span + step > 0);
    }
    a += a_span;
    b += b_span;
  };
  simt.FenceMma(d);
  if constexpr (kSpans > 0) {
    KEEPSET_UNROLL
    for (int span = 0; span < kSpans; ++span) add_span(span);
  } else {
    KEEPSET_NO_UNROLL
    for (int span = 0; span < num_spans; ++span) add_span(span);
  }
  simt.CommitMma();
}

template <DType kType, int kColumns, typename Simt>
KEEPSET_KERNEL_BODY inline void QueueProduct(const Simt& simt, const std::byte* a, int a_rows,
                                             const std::byte* b, int b_rows, int num_spans,
                                             float (&d)[kColumns / 2]) {
  constexpr uint64_t kRowUnits = kSpanBytes >> 4;
  const uint64_t a_first = OperandDescriptor(simt, a);
  const uint64_t b_first = OperandDescriptor(simt, b);
  const auto a_span = static_cast<uint64_t>(a_rows) * kRowUnits;
  const auto b_span = static_cast<uint64_t>(b_rows) * kRowUnits;
  if (num_spans == 2) {
    QueueSpans<kType, kColumns, 2>(simt, a_first, a_span, b_first, b_span, num_spans, d);
  } else if (num_spans == 1) {
    QueueSpans<kType, kColumns, 1>(simt, a_first, a_span, b_first, b_span, num_spans, d);
  } else if (num_spans == 4) {
    QueueSpans<kType, kColumns, 4>(simt, a_first, a_span, b_first, b_span, num_spans, d);
  } else {
    QueueSpans<kType, kColumns, 0>(simt, a_first, a_span, b_first, b_span, num_spans, d);
  }
}

// The two math groups take turns at queuing products.
class Turns {
 public:
  template <typename Simt>
  KEEPSET_KERNEL_BODY Turns(const Simt& simt, int group) : group_(group) {
    if (group_ == 1) simt.ArriveNamed(kTurnBarrier, kMathThreads);
  }
  template <typename Simt>
  KEEPSET_KERNEL_BODY void Take(const Simt& simt) const {
    simt.SyncNamed(kTurnBarrier + group_, kMathThreads);
  }
  template <typename Simt>
  KEEPSET_KERNEL_BODY void Give(const Simt& simt) const {
    simt.ArriveNamed(kTurnBarrier + (group_ ^ 1), kMathThreads);
  }
  // Both have taken equally many turns; takes up what is left of the last one.
  template <typename Simt>
  KEEPSET_KERNEL_BODY void End(const Simt& simt) const {
    if (group_ == 0) Take(simt);
  }

 private:
  int group_;
};

// The share of a block: tasks [begin, end).
struct TaskRange {
  int64_t begin;
  int64_t end;
};
template <typename Simt>
KEEPSET_KERNEL_BODY inline TaskRange RangeOfBlock(const Simt& simt, int64_t num_tasks) {
  return {num_tasks * simt.block_x() / simt.grid_x(),
          num_tasks * (simt.block_x() + 1) / simt.grid_x()};
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_HOPPER_PIPELINE_INL_H_
