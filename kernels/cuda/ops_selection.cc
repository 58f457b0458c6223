// Selection, and the gather of what was selected.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/position_bitmap.h"
#include "kernels/cuda/row_ops.h"
#include "kernels/cuda/select.h"
#include "kernels/cuda/staging.h"
#include "kernels/op_checks.h"
#include "kernels/score_key.h"

namespace keepset::kernels::cuda {
namespace {

// Positions are 32-bit in kernels, with room for a warp's step past the end.
constexpr int64_t kMaxPositions = int64_t{1} << 30;

struct RowSpecs {
  std::vector<SelectRowArgs> args;
  std::vector<uint32_t> bitmaps;
  int64_t capacity = 0;  // positions that any row keeps, at most
};

absl::StatusOr<RowSpecs> DescribeRows(absl::Span<const SelectArgs> args, int64_t length) {
  RowSpecs specs;
  for (size_t i = 0; i < args.size(); ++i) {
    const SelectArgs& from = args[i];
    KEEPSET_RETURN_IF_ERROR(CheckSelectRow(from, length, static_cast<int64_t>(i)));
    SelectRowArgs to;
    to.budget = from.budget;
    to.min_kept = from.min_kept;
    to.threshold_key = ScoreKey(from.threshold);
    for (const SelectArgs::Range& range : from.protected_ranges) {
      to.num_protected += range.end - range.begin;
    }
    if (to.num_protected > 0) {
      to.bitmap_begin = static_cast<int64_t>(specs.bitmaps.size());
      specs.bitmaps.resize(specs.bitmaps.size() + BitmapWords(length));
      for (const SelectArgs::Range& range : from.protected_ranges) {
        SetBits(range.begin, range.end, specs.bitmaps.data() + to.bitmap_begin);
      }
    }
    specs.capacity = std::max(specs.capacity, std::min(from.budget, length));
    specs.args.push_back(to);
  }
  return specs;
}

}  // namespace

absl::StatusOr<std::vector<Selection>> Select(StreamState& state, const ScoreBuffer& scores,
                                              absl::Span<const SelectArgs> args) {
  KEEPSET_RETURN_IF_ERROR(CheckSelect(args, scores));
  const int64_t rows = scores.rows();
  const int64_t length = scores.cols();
  if (length > kMaxPositions) {
    return absl::InvalidArgumentError(
        absl::StrCat("select: ", length, " positions, want at most ", kMaxPositions, " on a GPU"));
  }
  KEEPSET_ASSIGN_OR_RETURN(const RowSpecs specs, DescribeRows(args, length));
  SelectParams params;
  KEEPSET_ASSIGN_OR_RETURN(params.scores, Readable(state, scores));
  params.rows = static_cast<int32_t>(rows);
  params.length = static_cast<int32_t>(length);
  params.args_step = args.size() == 1 ? 0 : 1;
  params.capacity = specs.capacity;
  KEEPSET_ASSIGN_OR_RETURN(
      const std::byte* const uploaded_args,
      state.Upload(specs.args.data(),
                   static_cast<int64_t>(specs.args.size() * sizeof(SelectRowArgs))));
  params.args = reinterpret_cast<const SelectRowArgs*>(uploaded_args);
  KEEPSET_ASSIGN_OR_RETURN(
      const std::byte* const uploaded_bitmaps,
      state.Upload(specs.bitmaps.data(),
                   static_cast<int64_t>(specs.bitmaps.size() * sizeof(uint32_t))));
  params.bitmaps = reinterpret_cast<const uint32_t*>(uploaded_bitmaps);

  const int64_t header_bytes = rows * int64_t{sizeof(SelectRowResult)};
  const int64_t bytes = header_bytes + rows * specs.capacity * int64_t{sizeof(int32_t)};
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const workspace, state.Workspace(bytes));
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const results, state.Results(bytes));
  params.results = reinterpret_cast<SelectRowResult*>(workspace);
  params.keep_indices = reinterpret_cast<int32_t*>(workspace + header_bytes);
  KEEPSET_RETURN_IF_ERROR(state.health().Check(LaunchSelect(params, state.stream()), "select"));
  KEEPSET_RETURN_IF_CUDA_ERROR(state.health(),
                               cudaMemcpyAsync(results, workspace, static_cast<size_t>(bytes),
                                               cudaMemcpyDeviceToHost, state.stream()));
  KEEPSET_RETURN_IF_ERROR(state.Wait());

  const auto* headers = reinterpret_cast<const SelectRowResult*>(results);
  const auto* indices = reinterpret_cast<const int32_t*>(results + header_bytes);
  std::vector<Selection> selections(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) {
    if (headers[row].first_nan >= 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          "select: row ", row, " position ", headers[row].first_nan, " is NaN, want a number"));
    }
    Selection& selection = selections[static_cast<size_t>(row)];
    selection.candidates = headers[row].candidates;
    selection.filled = headers[row].filled;
    const int32_t* const first = indices + row * specs.capacity;
    selection.keep_indices.assign(first, first + headers[row].num_kept);
  }
  return selections;
}

absl::Status GatherRows(StreamState& state, const KvView& in,
                        absl::Span<const absl::Span<const int32_t>> keep_indices,
                        const MutableKvView& out) {
  KEEPSET_RETURN_IF_ERROR(CheckGather(in, keep_indices, out));
  if (in.seq_len > kMaxPositions || out.seq_len > kMaxPositions) {
    return absl::InvalidArgumentError(
        absl::StrCat("gather: seq_len=", std::max(in.seq_len, out.seq_len), ", want at most ",
                     kMaxPositions, " on a GPU"));
  }
  std::vector<int32_t> indices;
  std::vector<int32_t> offsets = {0};
  std::vector<int64_t> counts;
  for (const absl::Span<const int32_t> set : keep_indices) {
    indices.insert(indices.end(), set.begin(), set.end());
    offsets.push_back(static_cast<int32_t>(indices.size()));
    counts.push_back(static_cast<int64_t>(set.size()));
  }
  const int64_t longest = *std::max_element(counts.begin(), counts.end());
  if (longest == 0) return state.Wait();
  if (indices.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    return absl::InvalidArgumentError(
        absl::StrCat("gather: ", indices.size(), " kept positions, want at most 2147483647"));
  }
  GatherParams params;
  KEEPSET_ASSIGN_OR_RETURN(params.in, StageRows(state, in, "gather: source"));
  KEEPSET_ASSIGN_OR_RETURN(const StagedDestination destination,
                           StageDestination(state, out, longest, "gather: destination"));
  params.out = destination.rows;
  params.num_sets = static_cast<int32_t>(keep_indices.size());
  params.row_bytes = static_cast<int32_t>(in.head_dim * DTypeBytes(in.dtype));
  params.unit_bytes = GatherUnitBytes(params.in, params.out, params.row_bytes);
  KEEPSET_ASSIGN_OR_RETURN(
      const std::byte* const uploaded_indices,
      state.Upload(indices.data(), static_cast<int64_t>(indices.size() * sizeof(int32_t))));
  params.indices = reinterpret_cast<const int32_t*>(uploaded_indices);
  KEEPSET_ASSIGN_OR_RETURN(
      const std::byte* const uploaded_offsets,
      state.Upload(offsets.data(), static_cast<int64_t>(offsets.size() * sizeof(int32_t))));
  params.offsets = reinterpret_cast<const int32_t*>(uploaded_offsets);
  KEEPSET_RETURN_IF_ERROR(
      state.health().Check(LaunchGather(params, longest, state.stream()), "gather"));
  return UnstageRows(state, destination, counts, out);
}

}  // namespace keepset::kernels::cuda
