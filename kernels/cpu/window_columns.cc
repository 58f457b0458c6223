// Window scores in two sweeps with one exponential per logit. The first sweep takes K in chunks of
// kChunkTokens: all query rows that share the KV head meet one widened, transposed copy of the
// chunk, and the exponentials relative to the chunk's row maximum are stored. Once every chunk is
// known, each (row, chunk) has one factor, and the second sweep reduces the stored values over the
// rows. With a given log-sum-exp the factor is known beforehand and one sweep does both.
//
// Chunks and the order of every sum are fixed, so neither the number of threads nor their schedule
// shows in the bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cpu/chunk_shape.h"
#include "kernels/cpu/element.h"
#include "kernels/cpu/exp_simd.h"
#include "kernels/cpu/logits_simd.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/pack_simd.h"
#include "kernels/cpu/reduce_rows_simd.h"
#include "kernels/cpu/row_pointers.h"
#include "kernels/op_checks.h"

namespace keepset::kernels::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634;
// Exponentials of KV heads processed together: a share of a third-level cache.
constexpr int64_t kGroupBytes = int64_t{4} << 20;
// Above this the query heads of one KV head are taken in turns, each with its own pass over K, and
// the rows of one head in blocks: a request of few bytes must not ask for rows x tokens of memory.
constexpr int64_t kUnitBytes = int64_t{256} << 20;

constexpr int64_t kCacheLine = 64;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of exponentials that one row of one head holds at a time.
int64_t RowBytes(const WindowArgs& args) {
  const int64_t chunks_kept = args.window_lse.present() ? 1 : CeilDiv(args.k.seq_len, kChunkTokens);
  return chunks_kept * kChunkTokens * int64_t{sizeof(float)};
}

// Query heads that meet one packed chunk of K together.
struct Unit {
  int64_t kv_head = 0;
  int64_t first_head = 0;
  int64_t num_heads = 0;
};

class WindowOp {
 public:
  // Reduces `num_rows` of the observed rows from `first_row` on.
  WindowOp(CpuContext& context, const WindowArgs& args, int64_t first_row, int64_t num_rows,
           float* out)
      : context_(context),
        args_(args),
        out_(out),
        seq_len_(args.k.seq_len),
        head_dim_(args.k.head_dim),
        group_(args.q.num_qo_heads / args.k.num_kv_heads),
        num_chunks_(CeilDiv(seq_len_, kChunkTokens)),
        first_row_(first_row),
        num_rows_(num_rows) {
    const int64_t head_bytes = num_rows_ * RowBytes(args);
    unit_heads_ = std::clamp<int64_t>(kUnitBytes / head_bytes, 1, group_);
    unit_bytes_ = unit_heads_ * head_bytes;
    unit_rows_ = unit_heads_ * num_rows_;
    unit_blocks_ = CeilDiv(unit_rows_, kRowBlock);
    stat_rows_ = CeilDiv(unit_rows_, kMaxLanes) * kMaxLanes;
    units_per_kv_head_ = CeilDiv(group_, unit_heads_);
    num_units_ = units_per_kv_head_ * args.k.num_kv_heads;
    group_units_ = std::clamp<int64_t>(kGroupBytes / unit_bytes_, 1, num_units_);
  }

  absl::Status Run() {
    KEEPSET_RETURN_IF_ERROR(Reserve());
    KEEPSET_RETURN_IF_ERROR(context_.TryParallelFor(
        num_units_, [&](int64_t unit, int slot) { return PackUnitQueries(unit, slot); }));
    if (has_lse()) {
      return context_.TryParallelFor(num_units_ * num_chunks_, [&](int64_t task, int slot) {
        return GivenLseChunk(task / num_chunks_, task % num_chunks_, slot);
      });
    }
    for (int64_t begin = 0; begin < num_units_; begin += group_units_) {
      const int64_t count = std::min(group_units_, num_units_ - begin);
      KEEPSET_RETURN_IF_ERROR(context_.TryParallelFor(count * num_chunks_, [&](int64_t task,
                                                                               int slot) {
        return FirstSweep(begin + task / num_chunks_, task / num_chunks_, task % num_chunks_, slot);
      }));
      context_.ParallelFor(count, [&](int64_t place, int) {
        ChunkFactors(maxes(place, 0), sums(place, 0), num_chunks_, stat_rows_, factors(place, 0));
      });
      context_.ParallelFor(count * num_chunks_, [&](int64_t task, int) {
        const int64_t place = task / num_chunks_;
        const int64_t chunk = task % num_chunks_;
        ReduceChunk(UnitAt(begin + place), chunk, exponentials(place, chunk),
                    factors(place, chunk));
      });
    }
    return absl::OkStatus();
  }

 private:
  bool has_lse() const { return args_.window_lse.present(); }
  int64_t ChunkBegin(int64_t chunk) const { return chunk * kChunkTokens; }
  int64_t ChunkCount(int64_t chunk) const {
    return std::min(kChunkTokens, seq_len_ - ChunkBegin(chunk));
  }
  // Tokens of the chunk that used row `row` sees.
  int64_t Visible(int64_t row, int64_t chunk) const {
    const int64_t seen = args_.row_positions[first_row_ + row] + 1 - ChunkBegin(chunk);
    return std::clamp<int64_t>(seen, 0, ChunkCount(chunk));
  }

  Unit UnitAt(int64_t index) const {
    Unit unit;
    unit.kv_head = index / units_per_kv_head_;
    const int64_t first = index % units_per_kv_head_ * unit_heads_;
    unit.first_head = unit.kv_head * group_ + first;
    unit.num_heads = std::min(unit_heads_, group_ - first);
    return unit;
  }

  float* queries(int64_t unit, int64_t block) {
    return context_.shared(SharedScratch::kQueries).as<float>() +
           (unit * unit_blocks_ + block) * head_dim_ * kRowBlock;
  }
  // [num_rows of the unit, kChunkTokens]
  float* exponentials(int64_t place, int64_t chunk) {
    return context_.shared(SharedScratch::kExponentials).as<float>() +
           (place * num_chunks_ + chunk) * unit_rows_ * kChunkTokens;
  }
  // Per (unit, chunk): [stat_rows_]
  float* stats(int kind, int64_t place, int64_t chunk) {
    return context_.shared(SharedScratch::kRowStats).as<float>() +
           ((kind * group_units_ + place) * num_chunks_ + chunk) * stat_rows_;
  }
  float* maxes(int64_t place, int64_t chunk) { return stats(0, place, chunk); }
  float* sums(int64_t place, int64_t chunk) { return stats(1, place, chunk); }
  float* factors(int64_t place, int64_t chunk) { return stats(2, place, chunk); }
  // log2-sum-exp2 of a query row, at the place of the statistics: [num_qo_heads, num_rows_]
  float* references() { return context_.shared(SharedScratch::kRowStats).as<float>(); }

  absl::Status Reserve() {
    constexpr int64_t kFloat = sizeof(float);
    KEEPSET_RETURN_IF_ERROR(
        context_.shared(SharedScratch::kQueries)
            .Reserve(num_units_ * unit_blocks_ * head_dim_ * kRowBlock * kFloat));
    if (has_lse()) {
      KEEPSET_RETURN_IF_ERROR(context_.shared(SharedScratch::kRowStats)
                                  .Reserve(args_.q.num_qo_heads * num_rows_ * kFloat));
      KEEPSET_RETURN_IF_ERROR(context_.ReserveSlots(SlotScratch::kExponentials, unit_bytes_));
    } else {
      KEEPSET_RETURN_IF_ERROR(
          context_.shared(SharedScratch::kExponentials).Reserve(group_units_ * unit_bytes_));
      KEEPSET_RETURN_IF_ERROR(context_.shared(SharedScratch::kRowStats)
                                  .Reserve(3 * group_units_ * num_chunks_ * stat_rows_ * kFloat));
    }
    KEEPSET_RETURN_IF_ERROR(
        context_.ReserveSlots(SlotScratch::kPanels, kChunkTokens * head_dim_ * kFloat));
    KEEPSET_RETURN_IF_ERROR(
        context_.ReserveSlots(SlotScratch::kStaging, StagingFloats(head_dim_) * kFloat));
    KEEPSET_RETURN_IF_ERROR(
        context_.ReserveSlots(SlotScratch::kLogits, kRowBlock * kChunkTokens * kFloat));
    return context_.ReserveSlots(SlotScratch::kPointers, kChunkTokens * int64_t{sizeof(void*)});
  }

  const std::byte* QueryRow(int64_t head, int64_t i) const {
    return args_.q.data +
           (head * args_.q.head_stride + i * args_.q.row_stride) * DTypeBytes(args_.q.dtype);
  }

  absl::Status PackUnitQueries(int64_t unit_index, int slot) {
    const Unit unit = UnitAt(unit_index);
    const int64_t rows = unit.num_heads * num_rows_;
    // Folding log2(e) into the scale turns every exponential into a power of two.
    const float scale = static_cast<float>(args_.softmax_scale * kLog2E);
    float* staging = context_.slot(slot, SlotScratch::kStaging).as<float>();
    for (int64_t begin = 0; begin < rows; begin += kRowBlock) {
      const int64_t count = std::min(kRowBlock, rows - begin);
      const std::byte* block[kRowBlock];
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = begin + r;
        const int64_t head = unit.first_head + row / num_rows_;
        const int64_t i = first_row_ + row % num_rows_;
        block[r] = QueryRow(head, i);
        if (has_lse()) KEEPSET_RETURN_IF_ERROR(ReadLse(head, i));
      }
      if (!PackQueries(block, count, head_dim_, args_.q.dtype, scale, staging,
                       queries(unit_index, begin / kRowBlock))) {
        int64_t row = begin;
        while (FindNonFinite(block[row - begin], head_dim_, args_.q.dtype) < 0) ++row;
        return absl::InvalidArgumentError(
            absl::StrCat(args_.what, ": q: head ", unit.first_head + row / num_rows_, " row ",
                         first_row_ + row % num_rows_, " is not finite"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadLse(int64_t head, int64_t i) {
    const LseView& view = args_.window_lse;
    const float lse = LoadElement(view.data, head * view.head_stride + i, view.dtype);
    const float reference = static_cast<float>(lse * kLog2E);
    if (!IsFinite(reference)) {
      return absl::InvalidArgumentError(
          absl::StrCat(args_.what, ": window_lse: head ", head, " row ", i, " is not finite"));
    }
    references()[head * num_rows_ + i - first_row_] = reference;
    return absl::OkStatus();
  }

  // Fills the slot's panels with the unit's keys of the chunk.
  absl::Status PackKeys(const Unit& unit, int64_t chunk, int slot) {
    const std::byte** rows = context_.slot(slot, SlotScratch::kPointers).as<const std::byte*>();
    const int64_t count = ChunkCount(chunk);
    RowPointers(args_.k, unit.kv_head, ChunkBegin(chunk), count, rows);
    if (PackTokens(rows, count, head_dim_, args_.k.dtype,
                   context_.slot(slot, SlotScratch::kStaging).as<float>(),
                   context_.slot(slot, SlotScratch::kPanels).as<float>())) {
      return absl::OkStatus();
    }
    int64_t t = 0;
    while (t + 1 < count && FindNonFinite(rows[t], head_dim_, args_.k.dtype) < 0) ++t;
    return absl::InvalidArgumentError(absl::StrCat(args_.what, ": k: head ", unit.kv_head,
                                                   " position ", ChunkBegin(chunk) + t,
                                                   " is not finite"));
  }

  // Asks for the share of the next chunk's keys that belongs to one block of query rows. The rows
  // of a head lie far apart (2 KiB in NHD), where hardware does not prefetch.
  void PrefetchNextKeys(const Unit& unit, int64_t chunk, int64_t begin_row, int64_t rows,
                        int slot) {
    if (chunk + 1 >= num_chunks_) return;
    const int64_t next = ChunkBegin(chunk + 1);
    const int64_t tokens = ChunkCount(chunk + 1);
    const int64_t first = tokens * begin_row / rows;
    const int64_t last = tokens * std::min(begin_row + kRowBlock, rows) / rows;
    const std::byte** keys = context_.slot(slot, SlotScratch::kPointers).as<const std::byte*>();
    RowPointers(args_.k, unit.kv_head, next + first, last - first, keys);
    const int64_t row_bytes = head_dim_ * DTypeBytes(args_.k.dtype);
    for (int64_t t = 0; t < last - first; ++t) {
      for (int64_t byte = 0; byte < row_bytes; byte += kCacheLine) {
        __builtin_prefetch(keys[t] + byte, 0, 2);
      }
    }
  }

  // Calls fn(first row of a block, rows of the block, what each sees, logits) for every block of
  // rows that sees any of the chunk; fn returns the place of a bad row in the block, or -1.
  template <typename Fn>
  absl::Status ForLogits(int64_t unit_index, const Unit& unit, int64_t chunk, int slot, Fn fn) {
    const float* panels = context_.slot(slot, SlotScratch::kPanels).as<float>();
    float* logits = context_.slot(slot, SlotScratch::kLogits).as<float>();
    const int64_t rows = unit.num_heads * num_rows_;
    for (int64_t begin = 0; begin < rows; begin += kRowBlock) {
      const int64_t count = std::min(kRowBlock, rows - begin);
      int64_t visible[kRowBlock];
      int64_t most = 0;
      for (int64_t r = 0; r < count; ++r) {
        visible[r] = Visible((begin + r) % num_rows_, chunk);
        most = std::max(most, visible[r]);
      }
      PrefetchNextKeys(unit, chunk, begin, rows, slot);
      if (most == 0) continue;
      BlockLogits(queries(unit_index, begin / kRowBlock), count, panels, most, head_dim_, logits);
      const int64_t bad = fn(begin, count, visible, logits);
      if (bad >= 0) {
        return LogitError(unit, begin + bad, chunk, logits + bad * kChunkTokens, visible[bad]);
      }
    }
    return absl::OkStatus();
  }

  absl::Status LogitError(const Unit& unit, int64_t row, int64_t chunk, const float* logits,
                          int64_t visible) const {
    const int64_t head = unit.first_head + row / num_rows_;
    const int64_t i = first_row_ + row % num_rows_;
    for (int64_t t = 0; t < visible; ++t) {
      if (!IsFinite(logits[t])) {
        return absl::InvalidArgumentError(
            absl::StrCat(args_.what, ": logits: head ", head, " row ", i, " position ",
                         ChunkBegin(chunk) + t, " is not finite: q.k * softmax_scale overflows"));
      }
    }
    return absl::InvalidArgumentError(
        absl::StrCat(args_.what, ": window_lse: head ", head, " row ", i,
                     " lies far below the row's logits, want the natural log-sum-exp"));
  }

  absl::Status FirstSweep(int64_t unit_index, int64_t place, int64_t chunk, int slot) {
    const Unit unit = UnitAt(unit_index);
    KEEPSET_RETURN_IF_ERROR(PackKeys(unit, chunk, slot));
    float* max = maxes(place, chunk);
    float* sum = sums(place, chunk);
    std::fill(max, max + stat_rows_, 0.0f);
    std::fill(sum, sum + stat_rows_, 0.0f);
    float* exps = exponentials(place, chunk);
    return ForLogits(unit_index, unit, chunk, slot,
                     [&](int64_t begin, int64_t rows, const int64_t* visible, const float* logits) {
                       return ExpBelowMax(logits, rows, visible, ChunkCount(chunk),
                                          exps + begin * kChunkTokens, max + begin, sum + begin);
                     });
  }

  absl::Status GivenLseChunk(int64_t unit_index, int64_t chunk, int slot) {
    const Unit unit = UnitAt(unit_index);
    KEEPSET_RETURN_IF_ERROR(PackKeys(unit, chunk, slot));
    float* exps = context_.slot(slot, SlotScratch::kExponentials).as<float>();
    const float* reference = references() + unit.first_head * num_rows_;
    KEEPSET_RETURN_IF_ERROR(
        ForLogits(unit_index, unit, chunk, slot,
                  [&](int64_t begin, int64_t rows, const int64_t* visible, const float* logits) {
                    return ExpBelow(logits, rows, visible, reference + begin, ChunkCount(chunk),
                                    exps + begin * kChunkTokens);
                  }));
    ReduceChunk(unit, chunk, exps, nullptr);
    return absl::OkStatus();
  }

  // exps: [unit rows, kChunkTokens], rows that see nothing of the chunk are not filled in.
  void ReduceChunk(const Unit& unit, int64_t chunk, const float* exps, const float* row_factors) {
    // Positions ascend, so the rows that see nothing come first.
    int64_t first = 0;
    while (first < num_rows_ && Visible(first, chunk) == 0) ++first;
    for (int64_t j = 0; j < unit.num_heads; ++j) {
      float* to = out_ + (unit.first_head + j) * seq_len_ + ChunkBegin(chunk);
      const int64_t row = j * num_rows_ + first;
      ReduceRows(exps + row * kChunkTokens, kChunkTokens,
                 row_factors == nullptr ? nullptr : row_factors + row, num_rows_ - first,
                 args_.reduction, num_rows_, ChunkCount(chunk), to);
    }
  }

  CpuContext& context_;
  const WindowArgs& args_;
  float* const out_;
  const int64_t seq_len_;
  const int64_t head_dim_;
  const int64_t group_;  // query heads per KV head
  const int64_t num_chunks_;
  const int64_t first_row_;
  const int64_t num_rows_;  // rows used of each query head
  int64_t unit_heads_ = 0;
  int64_t unit_bytes_ = 0;
  int64_t unit_rows_ = 0;
  int64_t unit_blocks_ = 0;
  int64_t stat_rows_ = 0;
  int64_t units_per_kv_head_ = 0;
  int64_t num_units_ = 0;
  int64_t group_units_ = 0;  // units whose exponentials are held at the same time
};

// Takes the rows in blocks of `rows_at_once`. Every value is >= 0, so that both sums and maxima
// begin at 0.
absl::Status RunInBlocks(CpuContext& context, const WindowArgs& args, int64_t rows_at_once,
                         ScoreBuffer& out) {
  const int64_t num_rows = args.q.num_rows;
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<ScoreBuffer> block,
                           CpuScoreBuffer::New(out.rows(), out.cols()));
  KEEPSET_RETURN_IF_ERROR(Fill(context, 0, out.cols(), 0.0f, out));
  const bool is_max = args.reduction == RowReduction::kMax;
  for (int64_t begin = 0; begin < num_rows; begin += rows_at_once) {
    const int64_t count = std::min(rows_at_once, num_rows - begin);
    KEEPSET_RETURN_IF_ERROR(WindowOp(context, args, begin, count, block->data()).Run());
    const float weight = args.reduction == RowReduction::kMean
                             ? static_cast<float>(count) / static_cast<float>(num_rows)
                             : 1.0f;
    KEEPSET_RETURN_IF_ERROR(
        Accumulate(context, *block, is_max ? Merge::kMax : Merge::kSum, weight, out));
  }
  return absl::OkStatus();
}

absl::Status ScoreWindow(CpuContext& context, const WindowArgs& args, ScoreBuffer& out) {
  const int64_t num_rows = args.q.num_rows;
  if (args.reduction == RowReduction::kLast) {
    return WindowOp(context, args, num_rows - 1, 1, out.data()).Run();
  }
  const int64_t rows_at_once = std::max<int64_t>(1, kUnitBytes / RowBytes(args));
  if (num_rows > rows_at_once) return RunInBlocks(context, args, rows_at_once, out);
  return WindowOp(context, args, 0, num_rows, out.data()).Run();
}

}  // namespace

absl::Status WindowColumns(CpuContext& context, const WindowArgs& args, ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(CheckWindow(args, out));
  KEEPSET_RETURN_IF_ERROR(ScoreWindow(context, args, out));
  if (args.value_norms == nullptr) return absl::OkStatus();
  return RowNorms(context, args.v, absl::StrCat(args.what, ": v"), *args.value_norms);
}

}  // namespace keepset::kernels::cpu
