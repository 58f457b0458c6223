#include <algorithm>
#include <cstdint>
#include <cstring>

#include "absl/status/status.h"
#include "base/status_macros.h"
#include "kernels/compaction.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/row_pointers.h"
#include "kernels/op_checks.h"

namespace keepset::kernels::cpu {
namespace {

constexpr int64_t kRowsPerTask = 256;

}  // namespace

absl::Status GatherRows(CpuContext& context, const KvView& in,
                        absl::Span<const absl::Span<const int32_t>> keep_indices,
                        const MutableKvView& out) {
  KEEPSET_RETURN_IF_ERROR(CheckGather(in, keep_indices, out));
  int64_t longest = 0;
  for (const absl::Span<const int32_t> set : keep_indices) {
    longest = std::max(longest, static_cast<int64_t>(set.size()));
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

// A head's rows are moved by one thread.
absl::Status CompactRows(CpuContext& context,
                         absl::Span<const absl::Span<const int32_t>> keep_indices,
                         const MutableKvView& x) {
  KEEPSET_RETURN_IF_ERROR(CheckCompact(keep_indices, x));
  context.ParallelFor(x.num_kv_heads,
                      [&](int64_t head, int) { CompactHead(keep_indices, x, head); });
  return absl::OkStatus();
}

}  // namespace keepset::kernels::cpu
