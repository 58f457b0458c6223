#include "kernels/op_checks.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/row_offset.h"
#include "kernels/score_key.h"

namespace keepset::kernels {
namespace {

// Half-open byte range of memory.
struct ByteRange {
  uintptr_t begin = 0;
  uintptr_t end = 0;
};

// Ranges that hold every row of a validated view: one per block, or one per block and head where
// other blocks lie between the heads of one.
template <typename View>
std::vector<ByteRange> Footprint(const View& view) {
  const bool is_paged = view.block_size > 0;
  const int64_t span = is_paged ? view.block_size : view.seq_len;
  const int64_t bytes = DTypeBytes(view.dtype);
  std::vector<ByteRange> ranges;
  for (int64_t begin = 0; begin < view.seq_len; begin += span) {
    const int64_t tokens = std::min(span, view.seq_len - begin);
    const int64_t head_extent = (tokens - 1) * view.token_stride + view.head_dim;
    const int64_t block_extent = head_extent + (view.num_kv_heads - 1) * view.head_stride;
    const bool apart =
        view.head_stride >= head_extent && (!is_paged || block_extent > view.block_stride);
    const int64_t extent = apart ? head_extent : block_extent;
    for (int64_t head = 0; head < (apart ? view.num_kv_heads : 1); ++head) {
      const auto start = reinterpret_cast<uintptr_t>(view.data) + RowOffsetBytes(view, head, begin);
      ranges.push_back({start, start + static_cast<uintptr_t>(extent * bytes)});
    }
  }
  return ranges;
}

// The range from the lowest to the highest byte. ranges: at least one.
ByteRange Hull(const std::vector<ByteRange>& ranges) {
  ByteRange hull = ranges.front();
  for (const ByteRange& range : ranges) {
    hull.begin = std::min(hull.begin, range.begin);
    hull.end = std::max(hull.end, range.end);
  }
  return hull;
}

bool Overlap(std::vector<ByteRange> a, std::vector<ByteRange> b) {
  const ByteRange hull_a = Hull(a);
  const ByteRange hull_b = Hull(b);
  if (hull_a.end <= hull_b.begin || hull_b.end <= hull_a.begin) return false;
  const auto by_begin = [](const ByteRange& x, const ByteRange& y) { return x.begin < y.begin; };
  std::sort(a.begin(), a.end(), by_begin);
  std::sort(b.begin(), b.end(), by_begin);
  // Blocks of one side may lie within each other (a shared block), so remember the furthest end.
  size_t j = 0;
  uintptr_t furthest = 0;
  for (const ByteRange& range : a) {
    while (j < b.size() && b[j].begin < range.end) furthest = std::max(furthest, b[j++].end);
    if (furthest > range.begin) return true;
  }
  return false;
}

absl::Status CheckSetCount(size_t num_sets, int64_t num_kv_heads) {
  if (num_sets == 1 || static_cast<int64_t>(num_sets) == num_kv_heads) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("gather: ", num_sets, " keep sets, want 1 or ", num_kv_heads));
}

absl::Status CheckPositions(absl::Span<const int32_t> set, int64_t seq_len, size_t number) {
  for (size_t i = 0; i < set.size(); ++i) {
    if (set[i] >= 0 && set[i] < seq_len) continue;
    return absl::InvalidArgumentError(absl::StrCat("gather: keep set ", number, ": entry ", i,
                                                   " is ", set[i], ", want 0..", seq_len - 1));
  }
  return absl::OkStatus();
}

absl::Status CheckGatherShapes(const KvView& in, const MutableKvView& out, size_t num_sets) {
  KEEPSET_RETURN_IF_ERROR(ValidateView(in, "gather: source"));
  KEEPSET_RETURN_IF_ERROR(ValidateView(out, "gather: destination"));
  if (in.dtype != out.dtype) {
    return absl::InvalidArgumentError(absl::StrCat("gather: destination: dtype ",
                                                   DTypeName(out.dtype), ", want ",
                                                   DTypeName(in.dtype), " as the source has"));
  }
  if (in.num_kv_heads != out.num_kv_heads || in.head_dim != out.head_dim) {
    return absl::InvalidArgumentError(absl::StrCat(
        "gather: destination: num_kv_heads=", out.num_kv_heads, " head_dim=", out.head_dim,
        ", want ", in.num_kv_heads, " and ", in.head_dim, " as the source has"));
  }
  return CheckSetCount(num_sets, in.num_kv_heads);
}

}  // namespace

absl::Status NamedBy(absl::string_view what, const absl::Status& status) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(what, ": ", status.message()));
}

absl::Status CheckShape(const ScoreBuffer& x, int64_t rows, int64_t cols, absl::string_view name) {
  if (x.rows() == rows && x.cols() == cols) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, ": shape [", x.rows(), ", ", x.cols(),
                                                 "], want [", rows, ", ", cols, "]"));
}

absl::Status CheckRowPositions(absl::Span<const int64_t> row_positions, int64_t num_rows,
                               absl::string_view what) {
  // Beyond it sums with offsets into the prompt could overflow.
  constexpr int64_t kMaxPosition = std::numeric_limits<int32_t>::max();
  if (static_cast<int64_t>(row_positions.size()) != num_rows) {
    return absl::InvalidArgumentError(absl::StrCat(
        what, ": row_positions has ", row_positions.size(), " entries, want ", num_rows));
  }
  int64_t least = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    if (row_positions[i] < least || row_positions[i] > kMaxPosition) {
      return absl::InvalidArgumentError(absl::StrCat(what, ": row_positions[", i,
                                                     "]=", row_positions[i], ", want ", least, "..",
                                                     kMaxPosition, " (ascending)"));
    }
    least = row_positions[i] + 1;
  }
  return absl::OkStatus();
}

absl::Status CheckHeadRows(absl::Span<const HeadRows> heads, int64_t num_heads, int64_t num_rows,
                           absl::string_view what) {
  for (size_t j = 0; j < heads.size(); ++j) {
    const HeadRows& one = heads[j];
    const int64_t least = j == 0 ? 0 : heads[j - 1].head;
    if (one.head < least || one.head >= num_heads) {
      return absl::InvalidArgumentError(absl::StrCat(what, ": heads[", j, "]: head ", one.head,
                                                     ", want ", least, "..", num_heads - 1,
                                                     " (ordered)"));
    }
    if (one.first_row < 0 || one.num_rows < 1 || one.first_row > num_rows - one.num_rows) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": heads[", j, "]: ", one.num_rows, " rows from ", one.first_row,
                       ", want at least one within 0..", num_rows - 1));
    }
  }
  return absl::OkStatus();
}

std::vector<HeadRows> WantedRows(absl::Span<const HeadRows> heads, RowReduction reduction,
                                 int64_t num_heads, int64_t num_rows) {
  std::vector<HeadRows> wanted(heads.begin(), heads.end());
  if (wanted.empty()) {
    for (int64_t h = 0; h < num_heads; ++h) wanted.push_back({h, 0, num_rows, reduction});
  }
  for (HeadRows& one : wanted) {
    if (one.reduction != RowReduction::kLast) continue;
    one.first_row += one.num_rows - 1;
    one.num_rows = 1;
  }
  return wanted;
}

namespace {

bool SaysKvHeads(absl::Span<const HeadRows> heads) {
  return !heads.empty() && heads.front().kv_head >= 0;
}

absl::Status CheckKvHeads(const WindowArgs& args) {
  if (!SaysKvHeads(args.heads)) return absl::OkStatus();
  int64_t least = 0;
  for (size_t j = 0; j < args.heads.size(); ++j) {
    const int64_t kv_head = args.heads[j].kv_head;
    if (kv_head < least || kv_head >= args.k.num_kv_heads) {
      return absl::InvalidArgumentError(absl::StrCat(args.what, ": heads[", j, "]: kv_head ",
                                                     kv_head, ", want ", least, "..",
                                                     args.k.num_kv_heads - 1, " (ordered)"));
    }
    least = kv_head;
  }
  return absl::OkStatus();
}

}  // namespace

int64_t KvHeadOf(const WindowArgs& args, const HeadRows& one) {
  if (one.kv_head >= 0) return one.kv_head;
  return one.head / (args.q.num_qo_heads / args.k.num_kv_heads);
}

int64_t MostHeadsOfAKvHead(const WindowArgs& args) {
  if (!SaysKvHeads(args.heads)) return args.q.num_qo_heads / args.k.num_kv_heads;
  int64_t most = 1;
  int64_t count = 1;
  for (size_t j = 1; j < args.heads.size(); ++j) {
    if (args.heads[j].kv_head != args.heads[j - 1].kv_head) {
      count = 1;
    } else if (args.heads[j].head != args.heads[j - 1].head) {
      most = std::max(most, ++count);
    }
  }
  return most;
}

absl::Status CheckWindow(const WindowArgs& args, const ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(ValidateView(args.q, absl::StrCat(args.what, ": q")));
  KEEPSET_RETURN_IF_ERROR(ValidateView(args.k, absl::StrCat(args.what, ": k")));
  if (args.q.head_dim != args.k.head_dim) {
    return absl::InvalidArgumentError(absl::StrCat(args.what, ": q: head_dim=", args.q.head_dim,
                                                   ", want ", args.k.head_dim, " as k has"));
  }
  if (!SaysKvHeads(args.heads) && args.q.num_qo_heads % args.k.num_kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(args.what, ": q: num_qo_heads=", args.q.num_qo_heads,
                     ", want a multiple of num_kv_heads=", args.k.num_kv_heads));
  }
  KEEPSET_RETURN_IF_ERROR(CheckRowPositions(args.row_positions, args.q.num_rows, args.what));
  KEEPSET_RETURN_IF_ERROR(
      CheckHeadRows(args.heads, args.q.num_qo_heads, args.q.num_rows, args.what));
  KEEPSET_RETURN_IF_ERROR(CheckKvHeads(args));
  if (!(args.softmax_scale > 0.0f) || !std::isfinite(args.softmax_scale)) {
    return absl::InvalidArgumentError(
        absl::StrCat(args.what, ": softmax_scale=", args.softmax_scale, ", want finite and > 0"));
  }
  if (args.window_lse.present()) {
    const LseView& lse = args.window_lse;
    KEEPSET_RETURN_IF_ERROR(ValidateView(lse, absl::StrCat(args.what, ": window_lse")));
    if (lse.num_qo_heads != args.q.num_qo_heads || lse.num_rows != args.q.num_rows) {
      return absl::InvalidArgumentError(
          absl::StrCat(args.what, ": window_lse: shape [", lse.num_qo_heads, ", ", lse.num_rows,
                       "], want [", args.q.num_qo_heads, ", ", args.q.num_rows, "] as q has"));
    }
  }
  if (args.value_norms != nullptr) {
    const std::string what = absl::StrCat(args.what, ": v");
    KEEPSET_RETURN_IF_ERROR(CheckRowNorms(args.v, what, *args.value_norms));
    if (args.v.num_kv_heads != args.k.num_kv_heads || args.v.seq_len != args.k.seq_len) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": num_kv_heads=", args.v.num_kv_heads, " seq_len=", args.v.seq_len,
                       ", want ", args.k.num_kv_heads, " and ", args.k.seq_len, " as k has"));
    }
  }
  const int64_t outputs =
      args.heads.empty() ? args.q.num_qo_heads : static_cast<int64_t>(args.heads.size());
  return CheckShape(out, outputs, args.k.seq_len, absl::StrCat(args.what, ": out"));
}

absl::Status CheckLayerCount(absl::Span<const WindowArgs> layers,
                             absl::Span<ScoreBuffer* const> outs) {
  if (!layers.empty() && layers.size() == outs.size()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("window columns: ", layers.size(), " layers and ",
                                                 outs.size(),
                                                 " destinations, want as many, at least one"));
}

absl::Status CheckTile(const TileArgs& args, const ScoreBuffer& out) {
  const TileView& tile = args.tile;
  KEEPSET_RETURN_IF_ERROR(ValidateView(tile, absl::StrCat(args.what, ": ", args.tensor)));
  KEEPSET_RETURN_IF_ERROR(CheckRowPositions(args.row_positions, tile.num_rows, args.what));
  KEEPSET_RETURN_IF_ERROR(CheckHeadRows(args.heads, tile.num_qo_heads, tile.num_rows, args.what));
  const int64_t outputs =
      args.heads.empty() ? tile.num_qo_heads : static_cast<int64_t>(args.heads.size());
  return CheckShape(out, outputs, tile.seq_len, absl::StrCat(args.what, ": out"));
}

std::string TileRowName(absl::string_view tile, int64_t num_rows, int64_t head, int64_t row) {
  std::string name = absl::StrCat(tile, ": head ", head);
  if (num_rows > 1) absl::StrAppend(&name, " row ", row);
  return name;
}

absl::Status CheckRowNorms(const KvView& x, absl::string_view what, const ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(ValidateView(x, what));
  return CheckShape(out, x.num_kv_heads, x.seq_len, absl::StrCat(what, ": norms"));
}

absl::Status CheckMergeRows(const ScoreBuffer& in, absl::Span<const float> weights,
                            const ScoreBuffer& out) {
  if (out.cols() != in.cols() || in.rows() % out.rows() != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("merge: rows [", in.rows(), ", ", in.cols(), "] into [", out.rows(), ", ",
                     out.cols(), "], want equal columns and a divisor of the rows"));
  }
  if (!weights.empty() && static_cast<int64_t>(weights.size()) != in.rows()) {
    return absl::InvalidArgumentError(
        absl::StrCat("merge: ", weights.size(), " weights, want ", in.rows(), " or none"));
  }
  return absl::OkStatus();
}

absl::Status CheckMultiply(const ScoreBuffer& y, const ScoreBuffer& x) {
  return CheckShape(y, y.rows() == 1 ? 1 : x.rows(), x.cols(), "multiply");
}

absl::Status CheckPool(int64_t kernel, int64_t length, const ScoreBuffer& x) {
  if (kernel < 1 || kernel % 2 == 0) {
    return absl::InvalidArgumentError(absl::StrCat("pool: kernel=", kernel, ", want odd and >= 1"));
  }
  if (length < 0 || length > x.cols()) {
    return absl::InvalidArgumentError(
        absl::StrCat("pool: length=", length, ", want 0..", x.cols()));
  }
  return absl::OkStatus();
}

absl::Status CheckNormalize(absl::Span<const SelectArgs::Range> excluded, const ScoreBuffer& x) {
  int64_t least = 0;
  for (const SelectArgs::Range& range : excluded) {
    if (range.begin < least || range.end < range.begin || range.end > x.cols()) {
      return absl::InvalidArgumentError(absl::StrCat("normalize: excluded [", range.begin, ", ",
                                                     range.end, "), want ascending ranges within ",
                                                     least, "..", x.cols()));
    }
    least = range.end;
  }
  return absl::OkStatus();
}

absl::Status CheckKeyNovelty(const KvView& k, absl::Span<const int64_t> kv_heads,
                             absl::string_view what, const ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(ValidateView(k, what));
  for (const int64_t head : kv_heads) {
    if (head >= 0 && head < k.num_kv_heads) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": KV head ", head, ", want 0..", k.num_kv_heads - 1));
  }
  return CheckShape(out, static_cast<int64_t>(kv_heads.size()), k.seq_len,
                    absl::StrCat(what, ": novelty"));
}

absl::Status CheckDilate(int64_t dilate) {
  if (dilate < 0) {
    return absl::InvalidArgumentError(absl::StrCat("dilate=", dilate, ", want >= 0"));
  }
  return absl::OkStatus();
}

absl::Status CheckFill(int64_t begin, int64_t end, const ScoreBuffer& x) {
  if (begin < 0 || begin > end || end > x.cols()) {
    return absl::InvalidArgumentError(
        absl::StrCat("fill: [", begin, ", ", end, "), want a range within 0..", x.cols()));
  }
  return absl::OkStatus();
}

absl::Status CheckMassRow(int64_t row, const ScoreBuffer& x) {
  if (row < 0 || row >= x.rows()) {
    return absl::InvalidArgumentError(
        absl::StrCat("entropy: row ", row, ", want 0..", x.rows() - 1));
  }
  return absl::OkStatus();
}

absl::Status CheckMass(double sum) {
  if (!(sum > 0.0) || !std::isfinite(sum)) {
    return absl::InvalidArgumentError(
        absl::StrCat("entropy: the attention mass sums to ", sum, ", want finite and > 0"));
  }
  return absl::OkStatus();
}

absl::Status CheckSelect(absl::Span<const SelectArgs> args, const ScoreBuffer& scores) {
  const int64_t rows = scores.rows();
  const int64_t cols = scores.cols();
  if (args.size() != 1 && static_cast<int64_t>(args.size()) != rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("select: ", args.size(), " arguments, want 1 or ", rows));
  }
  if (cols > std::numeric_limits<int32_t>::max()) {
    return absl::InvalidArgumentError(
        absl::StrCat("select: ", cols, " positions, want at most 2147483647"));
  }
  return absl::OkStatus();
}

absl::Status CheckSelectRow(const SelectArgs& args, int64_t length, int64_t row) {
  if (args.budget < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("select: row ", row, ": budget=", args.budget, ", want >= 0"));
  }
  if (args.min_kept < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("select: row ", row, ": min_kept=", args.min_kept, ", want >= 0"));
  }
  if (IsNanScore(args.threshold)) {
    return absl::InvalidArgumentError(absl::StrCat("select: row ", row, ": threshold is NaN"));
  }
  int64_t least = 0;
  int64_t total = 0;
  for (const SelectArgs::Range& range : args.protected_ranges) {
    if (range.begin < least || range.end < range.begin || range.end > length) {
      return absl::InvalidArgumentError(
          absl::StrCat("select: row ", row, ": protected range [", range.begin, ", ", range.end,
                       "), want ascending and disjoint within ", least, "..", length));
    }
    least = range.end;
    total += range.end - range.begin;
  }
  if (total > args.budget) {
    return absl::InvalidArgumentError(
        absl::StrCat("select: row ", row, ": ", total,
                     " protected positions, want at most budget=", args.budget));
  }
  return absl::OkStatus();
}

absl::Status CheckCopySize(const ScoreBuffer& x, int64_t count) {
  if (count == x.rows() * x.cols()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("copy: ", count, " values, want ", x.rows(), " x ",
                                                 x.cols(), " of the score buffer"));
}

absl::Status CheckGather(const KvView& in, absl::Span<const absl::Span<const int32_t>> keep_indices,
                         const MutableKvView& out) {
  KEEPSET_RETURN_IF_ERROR(CheckGatherShapes(in, out, keep_indices.size()));
  for (size_t s = 0; s < keep_indices.size(); ++s) {
    const absl::Span<const int32_t> set = keep_indices[s];
    const int64_t count = static_cast<int64_t>(set.size());
    if (count > out.seq_len) {
      return absl::InvalidArgumentError(absl::StrCat("gather: destination: capacity ", out.seq_len,
                                                     ", want >= ", count, " kept positions"));
    }
    KEEPSET_RETURN_IF_ERROR(CheckPositions(set, in.seq_len, s));
  }
  if (Overlap(Footprint(in), Footprint(out))) {
    return absl::InvalidArgumentError("gather: source and destination overlap, want apart");
  }
  return absl::OkStatus();
}

absl::Status CheckCompact(absl::Span<const absl::Span<const int32_t>> keep_indices,
                          const MutableKvView& x) {
  KEEPSET_RETURN_IF_ERROR(ValidateView(x, "gather in place"));
  KEEPSET_RETURN_IF_ERROR(CheckSetCount(keep_indices.size(), x.num_kv_heads));
  for (size_t s = 0; s < keep_indices.size(); ++s) {
    const absl::Span<const int32_t> set = keep_indices[s];
    KEEPSET_RETURN_IF_ERROR(CheckPositions(set, x.seq_len, s));
    for (size_t i = 1; i < set.size(); ++i) {
      if (set[i] > set[i - 1]) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("gather: keep set ", s, ": entry ", i, " is ", set[i], " after ", set[i - 1],
                       ", want ascending positions to gather in place"));
    }
  }
  return absl::OkStatus();
}

}  // namespace keepset::kernels
