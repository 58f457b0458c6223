#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/row_pointers.h"

namespace keepset::kernels::cpu {
namespace {

constexpr int64_t kRowsPerTask = 256;

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

absl::Status CheckShapes(const KvView& in, const MutableKvView& out, size_t num_sets) {
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
  if (num_sets != 1 && static_cast<int64_t>(num_sets) != in.num_kv_heads) {
    return absl::InvalidArgumentError(
        absl::StrCat("gather: ", num_sets, " keep sets, want 1 or ", in.num_kv_heads));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status GatherRows(CpuContext& context, const KvView& in,
                        absl::Span<const absl::Span<const int32_t>> keep_indices,
                        const MutableKvView& out) {
  KEEPSET_RETURN_IF_ERROR(CheckShapes(in, out, keep_indices.size()));
  int64_t longest = 0;
  for (size_t s = 0; s < keep_indices.size(); ++s) {
    const absl::Span<const int32_t> set = keep_indices[s];
    const int64_t count = static_cast<int64_t>(set.size());
    if (count > out.seq_len) {
      return absl::InvalidArgumentError(absl::StrCat("gather: destination: capacity ", out.seq_len,
                                                     ", want >= ", count, " kept positions"));
    }
    for (int64_t i = 0; i < count; ++i) {
      if (set[i] < 0 || set[i] >= in.seq_len) {
        return absl::InvalidArgumentError(absl::StrCat(
            "gather: keep set ", s, ": entry ", i, " is ", set[i], ", want 0..", in.seq_len - 1));
      }
    }
    longest = std::max(longest, count);
  }
  if (Overlap(Footprint(in), Footprint(out))) {
    return absl::InvalidArgumentError("gather: source and destination overlap, want apart");
  }
  const int64_t row_bytes = in.head_dim * DTypeBytes(in.dtype);
  const int64_t tasks_per_head = (longest + kRowsPerTask - 1) / kRowsPerTask;
  context.ParallelFor(in.num_kv_heads * tasks_per_head, [&](int64_t task, int) {
    const int64_t head = task / tasks_per_head;
    const absl::Span<const int32_t> set = keep_indices[keep_indices.size() == 1 ? 0 : head];
    const int64_t begin = task % tasks_per_head * kRowsPerTask;
    const int64_t end = std::min(begin + kRowsPerTask, static_cast<int64_t>(set.size()));
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(out.data + RowOffsetBytes(out, head, i),
                  in.data + RowOffsetBytes(in, head, set[i]), static_cast<size_t>(row_bytes));
    }
  });
  return absl::OkStatus();
}

}  // namespace keepset::kernels::cpu
