// Rows that move within one tensor.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "kernels/compaction.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/row_ops.h"
#include "kernels/cuda/staging.h"
#include "kernels/op_checks.h"

namespace keepset::kernels::cuda {
namespace {

// What a compaction copies through at once; less, down to the least, where memory is short.
constexpr int64_t kScratchBytes = int64_t{16} << 20;
constexpr int64_t kLeastScratchBytes = int64_t{256} << 10;

constexpr absl::string_view kTensor = "gather in place";

// Block table, keep sets and tensor of one gather, uploads of which are aligned one by one.
int64_t UploadBytes(const CompactTask& task) {
  constexpr int64_t kAligned = 4 * StreamState::kUploadAlignment;
  const auto blocks = static_cast<int64_t>(task.x.block_table.size());
  auto indices = static_cast<int64_t>(task.keep_indices.size()) + 1;
  for (const absl::Span<const int32_t> set : task.keep_indices) {
    indices += static_cast<int64_t>(set.size());
  }
  return (blocks + indices) * int64_t{sizeof(int32_t)} + int64_t{sizeof(GatherTensor)} + kAligned;
}

}  // namespace

absl::Status ReserveCompaction(StreamState& state, absl::Span<const CompactTask> tasks) {
  int64_t most_bytes = 0;
  int64_t least_bytes = 0;
  int64_t upload_bytes = 0;
  for (const CompactTask& task : tasks) {
    KEEPSET_RETURN_IF_ERROR(CheckCompact(task.keep_indices, task.x));
    KEEPSET_ASSIGN_OR_RETURN(const MemoryPlace place, PlaceOf(state, task.x.data, kTensor));
    if (place == MemoryPlace::kHost) continue;
    const auto scratch = [&task](int64_t limit) {
      return CompactionScratchBytes(task.keep_indices, task.x, limit);
    };
    most_bytes = std::max(most_bytes, scratch(kScratchBytes));
    least_bytes = std::max(least_bytes, scratch(kLeastScratchBytes));
    upload_bytes = std::max(upload_bytes, UploadBytes(task));
  }
  if (most_bytes == 0) return absl::OkStatus();
  KEEPSET_RETURN_IF_ERROR(state.ReserveUploads(upload_bytes));
  absl::Status kept = state.Keep(most_bytes);
  while (absl::IsResourceExhausted(kept) && most_bytes > least_bytes) {
    most_bytes = std::max(most_bytes / 2, least_bytes);
    kept = state.Keep(most_bytes);
  }
  return kept;
}

// Rows of host memory need no device.
absl::Status CompactRows(StreamState& state,
                         absl::Span<const absl::Span<const int32_t>> keep_indices,
                         const MutableKvView& x) {
  const CompactTask task = {keep_indices, x};
  KEEPSET_RETURN_IF_ERROR(ReserveCompaction(state, absl::MakeConstSpan(&task, 1)));
  KEEPSET_ASSIGN_OR_RETURN(const MemoryPlace place, PlaceOf(state, x.data, kTensor));
  if (place == MemoryPlace::kHost) {
    KEEPSET_RETURN_IF_ERROR(state.Wait());
    for (int64_t head = 0; head < x.num_kv_heads; ++head) CompactHead(keep_indices, x, head);
    return absl::OkStatus();
  }
  return CompactThrough(
      [&state](const KvView& in, absl::Span<const absl::Span<const int32_t>> sets,
               const MutableKvView& out) { return GatherRows(state, in, sets, out); },
      keep_indices, x, state.kept());
}

}  // namespace keepset::kernels::cuda
