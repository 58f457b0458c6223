#include "kernels/compaction.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "base/status_macros.h"
#include "kernels/row_offset.h"

namespace keepset::kernels {
namespace {

// Rows [begin, end) of x; begin is a multiple of its block size.
MutableKvView SubView(const MutableKvView& x, int64_t begin, int64_t end) {
  MutableKvView part = x;
  part.seq_len = end - begin;
  if (x.block_size > 0) {
    const int64_t first = begin / x.block_size;
    const int64_t last = (end + x.block_size - 1) / x.block_size;
    part.block_table = x.block_table.subspan(first, last - first);
    return part;
  }
  const int64_t offset = begin * x.token_stride * DTypeBytes(x.dtype);
  part.data += offset;
  part.size_bytes -= offset;
  return part;
}

int64_t LongestSet(absl::Span<const absl::Span<const int32_t>> keep_indices) {
  size_t longest = 0;
  for (const absl::Span<const int32_t> set : keep_indices) longest = std::max(longest, set.size());
  return static_cast<int64_t>(longest);
}

// A row of every head.
int64_t RowBytes(const MutableKvView& x) {
  return x.num_kv_heads * x.head_dim * DTypeBytes(x.dtype);
}

// Rows that go through `bytes` at a time: all of them, or whole blocks, at least one.
int64_t RowsAtOnce(const MutableKvView& x, int64_t longest, int64_t bytes) {
  if (longest * RowBytes(x) <= bytes) return longest;
  const int64_t unit = std::max<int64_t>(1, x.block_size);
  return std::min(longest, std::max<int64_t>(1, bytes / (RowBytes(x) * unit)) * unit);
}

}  // namespace

void CompactHead(absl::Span<const absl::Span<const int32_t>> keep_indices, const MutableKvView& x,
                 int64_t head) {
  const auto row_bytes = static_cast<size_t>(x.head_dim * DTypeBytes(x.dtype));
  const absl::Span<const int32_t> set = keep_indices[keep_indices.size() == 1 ? 0 : head];
  for (int64_t i = 0; i < static_cast<int64_t>(set.size()); ++i) {
    if (set[i] == i) continue;
    std::memcpy(x.data + RowOffsetBytes(x, head, i), x.data + RowOffsetBytes(x, head, set[i]),
                row_bytes);
  }
}

int64_t CompactionScratchBytes(absl::Span<const absl::Span<const int32_t>> keep_indices,
                               const MutableKvView& x, int64_t most_bytes) {
  return RowsAtOnce(x, LongestSet(keep_indices), most_bytes) * RowBytes(x);
}

// Kept rows lie at or behind the place they move to, so what a step writes no later step reads.
absl::Status CompactThrough(GatherFunction gather,
                            absl::Span<const absl::Span<const int32_t>> keep_indices,
                            const MutableKvView& x, absl::Span<std::byte> scratch) {
  const int64_t longest = LongestSet(keep_indices);
  if (longest == 0) return absl::OkStatus();
  const int64_t step = RowsAtOnce(x, longest, static_cast<int64_t>(scratch.size()));
  MutableKvView packed = x;
  packed.data = scratch.data();
  packed.size_bytes = static_cast<int64_t>(scratch.size());
  packed.token_stride = x.head_dim;
  packed.head_stride = step * x.head_dim;
  packed.block_size = packed.block_stride = 0;
  packed.block_table = {};
  std::vector<int32_t> places(step);
  std::iota(places.begin(), places.end(), 0);
  for (int64_t begin = 0; begin < longest; begin += step) {
    packed.seq_len = std::min(step, longest - begin);
    std::vector<absl::Span<const int32_t>> from;
    std::vector<absl::Span<const int32_t>> to;
    for (const absl::Span<const int32_t> set : keep_indices) {
      const auto first = std::min<size_t>(begin, set.size());
      from.push_back(set.subspan(first, packed.seq_len));
      to.push_back(absl::MakeConstSpan(places).first(from.back().size()));
    }
    KEEPSET_RETURN_IF_ERROR(gather(Readable(x), from, packed));
    KEEPSET_RETURN_IF_ERROR(
        gather(Readable(packed), to, SubView(x, begin, begin + packed.seq_len)));
  }
  return absl::OkStatus();
}

}  // namespace keepset::kernels
