#include "kernels/compute_backend.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>

#include "base/status_macros.h"
#include "kernels/op_checks.h"

namespace keepset::kernels {
namespace {

// What a compaction copies through at once, at least one block of rows.
constexpr int64_t kScratchBytes = int64_t{16} << 20;

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

}  // namespace

absl::Status ComputeBackend::WindowColumnsOfLayers(OpContext& context,
                                                   absl::Span<const WindowArgs> layers,
                                                   absl::Span<ScoreBuffer* const> outs) {
  KEEPSET_RETURN_IF_ERROR(CheckLayerCount(layers, outs));
  for (size_t i = 0; i < layers.size(); ++i) {
    KEEPSET_RETURN_IF_ERROR(WindowColumns(context, layers[i], *outs[i]));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<ComputeBackend::Mass>> ComputeBackend::MassAndEntropyOfEach(
    OpContext& context, absl::Span<const ScoreBuffer* const> buffers) {
  std::vector<Mass> masses;
  for (const ScoreBuffer* const buffer : buffers) {
    KEEPSET_ASSIGN_OR_RETURN(const Mass mass, MassAndEntropy(context, *buffer, /*row=*/0));
    masses.push_back(mass);
  }
  return masses;
}

absl::StatusOr<std::vector<std::vector<Selection>>> ComputeBackend::SelectEach(
    OpContext& context, absl::Span<const SelectTask> tasks) {
  std::vector<std::vector<Selection>> selections;
  for (const SelectTask& task : tasks) {
    KEEPSET_ASSIGN_OR_RETURN(std::vector<Selection> one, Select(context, *task.scores, task.args));
    selections.push_back(std::move(one));
  }
  return selections;
}

// Through scratch memory of the backend, some rows at a time: kept rows lie at or behind the place
// they move to, so what a step writes no later step reads.
absl::Status ComputeBackend::CompactRows(OpContext& context,
                                         absl::Span<const absl::Span<const int32_t>> keep_indices,
                                         const MutableKvView& x) {
  KEEPSET_RETURN_IF_ERROR(CheckCompact(keep_indices, x));
  int64_t longest = 0;
  for (const auto& set : keep_indices) {
    longest = std::max(longest, static_cast<int64_t>(set.size()));
  }
  if (longest == 0) return absl::OkStatus();
  const int64_t row_bytes = x.head_dim * DTypeBytes(x.dtype);
  const int64_t unit = std::max<int64_t>(1, x.block_size);
  const int64_t step = std::min(
      longest, std::max<int64_t>(1, kScratchBytes / (x.num_kv_heads * row_bytes * unit)) * unit);
  const int64_t scratch_floats =
      (x.num_kv_heads * step * row_bytes + int64_t{sizeof(float)} - 1) / int64_t{sizeof(float)};
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<ScoreBuffer> scratch,
                           NewBuffer(1, scratch_floats));
  MutableKvView packed = x;
  packed.data = reinterpret_cast<std::byte*>(scratch->data());
  packed.size_bytes = scratch_floats * int64_t{sizeof(float)};
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
    KEEPSET_RETURN_IF_ERROR(GatherRows(context, Readable(x), from, packed));
    KEEPSET_RETURN_IF_ERROR(
        GatherRows(context, Readable(packed), to, SubView(x, begin, begin + packed.seq_len)));
  }
  return absl::OkStatus();
}

absl::Status ComputeBackend::GatherRowsOfEach(OpContext& context,
                                              absl::Span<const GatherTask> tasks) {
  for (const GatherTask& task : tasks) {
    KEEPSET_RETURN_IF_ERROR(
        NamedBy(task.what, GatherRows(context, task.in, task.keep_indices, task.out)));
  }
  return absl::OkStatus();
}

}  // namespace keepset::kernels
