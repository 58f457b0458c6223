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
#include <vector>

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

// One observed row of one query head.
struct Row {
  int64_t head = 0;
  int64_t i = 0;
};

// One row of the result: a reduction over rows of the unit, which ascend in position.
struct Output {
  int64_t row = 0;        // of `out`
  int64_t first_row = 0;  // of the unit
  int64_t num_rows = 0;
  RowReduction reduction = RowReduction::kMean;
};

// Rows that meet one packed chunk of K together, and what is made of them.
struct Unit {
  int64_t kv_head = 0;
  int64_t first_row = 0;  // among all rows of the op
  int64_t num_rows = 0;
  int64_t first_output = 0;
  int64_t num_outputs = 0;
};

class WindowOp {
 public:
  // Makes row j of `out` from wanted[j]; `wanted` is ordered by head.
  WindowOp(CpuContext& context, const WindowArgs& args, absl::Span<const HeadRows> wanted,
           float* out)
      : context_(context),
        args_(args),
        out_(out),
        seq_len_(args.k.seq_len),
        head_dim_(args.k.head_dim),
        num_chunks_(CeilDiv(seq_len_, kChunkTokens)) {
    for (size_t begin = 0; begin < wanted.size();) {
      size_t end = begin;
      while (end < wanted.size() && wanted[end].head == wanted[begin].head) ++end;
      AddHead(wanted.subspan(begin, end - begin), static_cast<int64_t>(begin));
      begin = end;
    }
    num_units_ = static_cast<int64_t>(units_.size());
    for (const Unit& unit : units_) unit_rows_ = std::max(unit_rows_, unit.num_rows);
    unit_bytes_ = unit_rows_ * RowBytes(args);
    unit_blocks_ = CeilDiv(unit_rows_, kRowBlock);
    stat_rows_ = CeilDiv(unit_rows_, kMaxLanes) * kMaxLanes;
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
        ReduceChunk(units_[begin + place], chunk, exponentials(place, chunk),
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
  // Tokens of the chunk that observed row `i` sees.
  int64_t Visible(int64_t i, int64_t chunk) const {
    const int64_t seen = args_.row_positions[i] + 1 - ChunkBegin(chunk);
    return std::clamp<int64_t>(seen, 0, ChunkCount(chunk));
  }
  const Row& RowAt(const Unit& unit, int64_t row) const { return rows_[unit.first_row + row]; }

  // Adds what is wanted of one query head, row by row of the range that covers it, to the last unit
  // where that serves the same KV head and has room.
  void AddHead(absl::Span<const HeadRows> wanted, int64_t first_output) {
    const int64_t head = wanted.front().head;
    const int64_t kv_head = KvHeadOf(args_, wanted.front());
    int64_t begin = args_.q.num_rows;
    int64_t end = 0;
    for (const HeadRows& one : wanted) {
      begin = std::min(begin, one.first_row);
      end = std::max(end, one.first_row + one.num_rows);
    }
    const bool fits = !units_.empty() && units_.back().kv_head == kv_head &&
                      (units_.back().num_rows + end - begin) * RowBytes(args_) <= kUnitBytes;
    if (!fits) {
      Unit unit;
      unit.kv_head = kv_head;
      unit.first_row = static_cast<int64_t>(rows_.size());
      unit.first_output = first_output;
      units_.push_back(unit);
    }
    Unit& unit = units_.back();
    for (size_t j = 0; j < wanted.size(); ++j) {
      outputs_.push_back({first_output + static_cast<int64_t>(j),
                          unit.num_rows + wanted[j].first_row - begin, wanted[j].num_rows,
                          wanted[j].reduction});
    }
    for (int64_t i = begin; i < end; ++i) rows_.push_back({head, i});
    unit.num_rows += end - begin;
    unit.num_outputs += static_cast<int64_t>(wanted.size());
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
  // log2-sum-exp2 of every row of the op, at the place of the statistics.
  float* references() { return context_.shared(SharedScratch::kRowStats).as<float>(); }

  absl::Status Reserve() {
    constexpr int64_t kFloat = sizeof(float);
    KEEPSET_RETURN_IF_ERROR(
        context_.shared(SharedScratch::kQueries)
            .Reserve(num_units_ * unit_blocks_ * head_dim_ * kRowBlock * kFloat));
    if (has_lse()) {
      KEEPSET_RETURN_IF_ERROR(context_.shared(SharedScratch::kRowStats)
                                  .Reserve(static_cast<int64_t>(rows_.size()) * kFloat));
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
    const Unit& unit = units_[unit_index];
    const int64_t rows = unit.num_rows;
    // Folding log2(e) into the scale turns every exponential into a power of two.
    const float scale = static_cast<float>(args_.softmax_scale * kLog2E);
    float* staging = context_.slot(slot, SlotScratch::kStaging).as<float>();
    for (int64_t begin = 0; begin < rows; begin += kRowBlock) {
      const int64_t count = std::min(kRowBlock, rows - begin);
      const std::byte* block[kRowBlock];
      for (int64_t r = 0; r < count; ++r) {
        const Row& row = RowAt(unit, begin + r);
        block[r] = QueryRow(row.head, row.i);
        if (has_lse()) KEEPSET_RETURN_IF_ERROR(ReadLse(row, unit.first_row + begin + r));
      }
      if (!PackQueries(block, count, head_dim_, args_.q.dtype, scale, staging,
                       queries(unit_index, begin / kRowBlock))) {
        int64_t row = begin;
        while (FindNonFinite(block[row - begin], head_dim_, args_.q.dtype) < 0) ++row;
        return absl::InvalidArgumentError(absl::StrCat(args_.what, ": q: head ",
                                                       RowAt(unit, row).head, " row ",
                                                       RowAt(unit, row).i, " is not finite"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadLse(const Row& row, int64_t place) {
    const LseView& view = args_.window_lse;
    const float lse = LoadElement(view.data, row.head * view.head_stride + row.i, view.dtype);
    const double log2_per_unit = view.base == LogBase::kTwo ? 1.0 : kLog2E;
    const float reference = static_cast<float>(lse * log2_per_unit);
    if (!IsFinite(reference)) {
      return absl::InvalidArgumentError(absl::StrCat(args_.what, ": window_lse: head ", row.head,
                                                     " row ", row.i, " is not finite"));
    }
    references()[place] = reference;
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
    const int64_t rows = unit.num_rows;
    for (int64_t begin = 0; begin < rows; begin += kRowBlock) {
      const int64_t count = std::min(kRowBlock, rows - begin);
      int64_t visible[kRowBlock];
      int64_t most = 0;
      for (int64_t r = 0; r < count; ++r) {
        visible[r] = Visible(RowAt(unit, begin + r).i, chunk);
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
    const int64_t head = RowAt(unit, row).head;
    const int64_t i = RowAt(unit, row).i;
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
    const Unit& unit = units_[unit_index];
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
    const Unit& unit = units_[unit_index];
    KEEPSET_RETURN_IF_ERROR(PackKeys(unit, chunk, slot));
    float* exps = context_.slot(slot, SlotScratch::kExponentials).as<float>();
    const float* reference = references() + unit.first_row;
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
    for (int64_t j = unit.first_output; j < unit.first_output + unit.num_outputs; ++j) {
      const Output& output = outputs_[j];
      // Positions ascend, so the rows that see nothing come first.
      int64_t first = 0;
      while (first < output.num_rows &&
             Visible(RowAt(unit, output.first_row + first).i, chunk) == 0) {
        ++first;
      }
      float* to = out_ + output.row * seq_len_ + ChunkBegin(chunk);
      const int64_t row = output.first_row + first;
      ReduceRows(exps + row * kChunkTokens, kChunkTokens,
                 row_factors == nullptr ? nullptr : row_factors + row, output.num_rows - first,
                 output.reduction, output.num_rows, ChunkCount(chunk), to);
    }
  }

  CpuContext& context_;
  const WindowArgs& args_;
  float* const out_;
  const int64_t seq_len_;
  const int64_t head_dim_;
  const int64_t num_chunks_;
  std::vector<Row> rows_;
  std::vector<Unit> units_;
  std::vector<Output> outputs_;  // in order of `wanted`
  int64_t num_units_ = 0;
  // Of the largest unit.
  int64_t unit_rows_ = 0;
  int64_t unit_bytes_ = 0;
  int64_t unit_blocks_ = 0;
  int64_t stat_rows_ = 0;
  int64_t group_units_ = 0;  // units whose exponentials are held at the same time
};

// Takes the rows in blocks of `rows_at_once`. Every value is >= 0, so that both sums and maxima
// begin at 0.
absl::Status RunInBlocks(CpuContext& context, const WindowArgs& args, const HeadRows& wanted,
                         int64_t rows_at_once, float* out) {
  const int64_t cols = args.k.seq_len;
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<ScoreBuffer> block, CpuScoreBuffer::New(1, cols));
  std::fill(out, out + cols, 0.0f);
  for (int64_t begin = 0; begin < wanted.num_rows; begin += rows_at_once) {
    HeadRows part = wanted;
    part.first_row += begin;
    part.num_rows = std::min(rows_at_once, wanted.num_rows - begin);
    KEEPSET_RETURN_IF_ERROR(
        WindowOp(context, args, absl::MakeConstSpan(&part, 1), block->data()).Run());
    const float* values = block->data();
    if (wanted.reduction == RowReduction::kMax) {
      for (int64_t t = 0; t < cols; ++t) out[t] = std::max(out[t], values[t]);
      continue;
    }
    const float weight =
        wanted.reduction == RowReduction::kMean
            ? static_cast<float>(part.num_rows) / static_cast<float>(wanted.num_rows)
            : 1.0f;
    for (int64_t t = 0; t < cols; ++t) out[t] += weight * values[t];
  }
  return absl::OkStatus();
}

absl::Status ScoreWindow(CpuContext& context, const WindowArgs& args, ScoreBuffer& out) {
  const std::vector<HeadRows> wanted =
      WantedRows(args.heads, args.reduction, args.q.num_qo_heads, args.q.num_rows);
  const int64_t rows_at_once = std::max<int64_t>(1, kUnitBytes / RowBytes(args));
  if (args.q.num_rows <= rows_at_once) return WindowOp(context, args, wanted, out.data()).Run();
  for (size_t j = 0; j < wanted.size(); ++j) {
    KEEPSET_RETURN_IF_ERROR(RunInBlocks(context, args, wanted[j], rows_at_once,
                                        out.data() + static_cast<int64_t>(j) * args.k.seq_len));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WindowColumns(CpuContext& context, const WindowArgs& args, ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(CheckWindow(args, out));
  KEEPSET_RETURN_IF_ERROR(ScoreWindow(context, args, out));
  if (args.value_norms == nullptr) return absl::OkStatus();
  return RowNorms(context, args.v, absl::StrCat(args.what, ": v"), *args.value_norms);
}

}  // namespace keepset::kernels::cpu
