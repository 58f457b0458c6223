// Selection, and the gather of what was selected.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
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

// The rows of all tasks, one after the other.
struct RowSpecs {
  std::vector<SelectRowArgs> rows;
  std::vector<uint32_t> bitmaps;
  int64_t capacity = 0;  // positions that any row keeps, at most
  int64_t longest = 0;
};

absl::StatusOr<SelectRowArgs> DescribeRow(const SelectArgs& from, int64_t length, int64_t row,
                                          RowSpecs* specs) {
  KEEPSET_RETURN_IF_ERROR(CheckSelectRow(from, length, row));
  SelectRowArgs to;
  to.length = length;
  to.budget = from.budget;
  to.min_kept = from.min_kept;
  to.threshold_key = ScoreKey(from.threshold);
  for (const SelectArgs::Range& range : from.protected_ranges) {
    to.num_protected += range.end - range.begin;
  }
  if (to.num_protected > 0) {
    to.bitmap_begin = static_cast<int64_t>(specs->bitmaps.size());
    specs->bitmaps.resize(specs->bitmaps.size() + BitmapWords(length));
    for (const SelectArgs::Range& range : from.protected_ranges) {
      SetBits(range.begin, range.end, specs->bitmaps.data() + to.bitmap_begin);
    }
  }
  specs->capacity = std::max(specs->capacity, std::min(from.budget, length));
  return to;
}

absl::Status DescribeTask(StreamState& state, const SelectTask& task, RowSpecs* specs) {
  KEEPSET_RETURN_IF_ERROR(CheckSelect(task.args, *task.scores));
  const int64_t length = task.scores->cols();
  if (length > kMaxPositions) {
    return absl::InvalidArgumentError(
        absl::StrCat("select: ", length, " positions, want at most ", kMaxPositions, " on a GPU"));
  }
  specs->longest = std::max(specs->longest, length);
  KEEPSET_ASSIGN_OR_RETURN(const float* const scores, Readable(state, *task.scores));
  SelectRowArgs args;
  for (int64_t row = 0; row < task.scores->rows(); ++row) {
    if (row < static_cast<int64_t>(task.args.size())) {
      KEEPSET_ASSIGN_OR_RETURN(
          args, DescribeRow(task.args[static_cast<size_t>(row)], length, row, specs));
    }
    args.scores = scores + row * length;
    specs->rows.push_back(args);
  }
  return absl::OkStatus();
}

// What the kernel left of one task's rows; moves both on to the next task.
absl::StatusOr<std::vector<Selection>> ReadSelections(int64_t rows, int64_t capacity,
                                                      const SelectRowResult** headers,
                                                      const int32_t** indices) {
  std::vector<Selection> selections(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) {
    const SelectRowResult& header = *(*headers)++;
    if (header.first_nan >= 0) {
      return absl::InvalidArgumentError(absl::StrCat("select: row ", row, " position ",
                                                     header.first_nan, " is NaN, want a number"));
    }
    Selection& selection = selections[static_cast<size_t>(row)];
    selection.candidates = header.candidates;
    selection.filled = header.filled;
    selection.keep_indices.assign(*indices, *indices + header.num_kept);
    *indices += capacity;
  }
  return selections;
}

// Of each row the first positions, as many as its budget has.
std::vector<std::vector<Selection>> LongestSelections(absl::Span<const SelectTask> tasks,
                                                      const RowSpecs& specs) {
  std::vector<std::vector<Selection>> all;
  auto row = specs.rows.begin();
  for (const SelectTask& task : tasks) {
    std::vector<Selection>& selections = all.emplace_back();
    for (int64_t i = 0; i < task.scores->rows(); ++i, ++row) {
      Selection& selection = selections.emplace_back();
      selection.candidates = row->length;
      selection.keep_indices.resize(static_cast<size_t>(std::min(row->budget, row->length)));
      std::iota(selection.keep_indices.begin(), selection.keep_indices.end(), 0);
    }
  }
  return all;
}

}  // namespace

absl::StatusOr<std::vector<std::vector<Selection>>> SelectEach(StreamState& state,
                                                               absl::Span<const SelectTask> tasks) {
  if (tasks.empty()) return std::vector<std::vector<Selection>>();
  RowSpecs specs;
  for (const SelectTask& task : tasks) {
    KEEPSET_RETURN_IF_ERROR(DescribeTask(state, task, &specs));
  }
  SelectParams params;
  params.rows = static_cast<int32_t>(specs.rows.size());
  params.longest = specs.longest;
  params.capacity = specs.capacity;
  KEEPSET_ASSIGN_OR_RETURN(params.args, UploadArray<SelectRowArgs>(state, specs.rows));
  KEEPSET_ASSIGN_OR_RETURN(params.bitmaps, UploadArray<uint32_t>(state, specs.bitmaps));

  const int64_t header_bytes = params.rows * int64_t{sizeof(SelectRowResult)};
  const int64_t bytes = header_bytes + params.rows * specs.capacity * int64_t{sizeof(int32_t)};
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const workspace, state.Workspace(bytes));
  if (!state.is_queued()) {
    KEEPSET_RETURN_IF_ERROR(state.Wait());
    return LongestSelections(tasks, specs);
  }
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const results, state.Results(bytes));
  params.results = reinterpret_cast<SelectRowResult*>(workspace);
  params.keep_indices = reinterpret_cast<int32_t*>(workspace + header_bytes);
  KEEPSET_RETURN_IF_ERROR(
      state.Queue("select", [&] { return LaunchSelect(params, state.stream()); }));
  KEEPSET_RETURN_IF_CUDA_ERROR(state.health(),
                               cudaMemcpyAsync(results, workspace, static_cast<size_t>(bytes),
                                               cudaMemcpyDeviceToHost, state.stream()));
  KEEPSET_RETURN_IF_ERROR(state.Wait());

  const auto* headers = reinterpret_cast<const SelectRowResult*>(results);
  const auto* indices = reinterpret_cast<const int32_t*>(results + header_bytes);
  std::vector<std::vector<Selection>> selections;
  for (const SelectTask& task : tasks) {
    KEEPSET_ASSIGN_OR_RETURN(
        std::vector<Selection> one,
        ReadSelections(task.scores->rows(), specs.capacity, &headers, &indices));
    selections.push_back(std::move(one));
  }
  return selections;
}

absl::StatusOr<std::vector<Selection>> Select(StreamState& state, const ScoreBuffer& scores,
                                              absl::Span<const SelectArgs> args) {
  const SelectTask task = {&scores, args};
  KEEPSET_ASSIGN_OR_RETURN(std::vector<std::vector<Selection>> selections,
                           SelectEach(state, absl::MakeConstSpan(&task, 1)));
  return std::move(selections.front());
}

namespace {

// Tensors of one launch, more than any operation has; a grid dimension of 16 bits holds them.
constexpr size_t kMaxGatherTensors = 4096;

constexpr absl::string_view kSource = "gather: source";
constexpr absl::string_view kDestination = "gather: destination";

absl::Status CheckGatherTask(StreamState& state, const GatherTask& task) {
  KEEPSET_RETURN_IF_ERROR(CheckGather(task.in, task.keep_indices, task.out));
  if (task.in.seq_len > kMaxPositions || task.out.seq_len > kMaxPositions) {
    return absl::InvalidArgumentError(
        absl::StrCat("gather: seq_len=", std::max(task.in.seq_len, task.out.seq_len),
                     ", want at most ", kMaxPositions, " on a GPU"));
  }
  size_t kept = 0;
  for (const absl::Span<const int32_t> set : task.keep_indices) kept += set.size();
  if (kept > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    return absl::InvalidArgumentError(
        absl::StrCat("gather: ", kept, " kept positions, want at most 2147483647"));
  }
  KEEPSET_RETURN_IF_ERROR(PlaceOf(state, task.in.data, kSource).status());
  return PlaceOf(state, task.out.data, kDestination).status();
}

bool HaveTheSameSets(const GatherTask& a, const GatherTask& b) {
  return std::equal(a.keep_indices.begin(), a.keep_indices.end(), b.keep_indices.begin(),
                    b.keep_indices.end(),
                    [](absl::Span<const int32_t> one, absl::Span<const int32_t> other) {
                      return one.data() == other.data() && one.size() == other.size();
                    });
}

// A tensor on its way through the kernel.
struct StagedGather {
  GatherTensor tensor;
  StagedDestination destination;
  std::vector<int64_t> counts;  // rows of each set
};

absl::Status UploadSets(StreamState& state, const GatherTask& task, GatherTensor* tensor) {
  std::vector<int32_t> indices;
  std::vector<int32_t> offsets = {0};
  for (const absl::Span<const int32_t> set : task.keep_indices) {
    indices.insert(indices.end(), set.begin(), set.end());
    offsets.push_back(static_cast<int32_t>(indices.size()));
  }
  KEEPSET_ASSIGN_OR_RETURN(tensor->indices, UploadArray<int32_t>(state, indices));
  KEEPSET_ASSIGN_OR_RETURN(tensor->offsets, UploadArray<int32_t>(state, offsets));
  tensor->num_sets = static_cast<int32_t>(task.keep_indices.size());
  return absl::OkStatus();
}

// `before` was staged last since the last wait, from `task_before`; null: none was.
absl::StatusOr<StagedGather> StageGather(StreamState& state, const GatherTask& task,
                                         const StagedGather* before,
                                         const GatherTask* task_before) {
  StagedGather staged;
  for (const absl::Span<const int32_t> set : task.keep_indices) {
    staged.counts.push_back(static_cast<int64_t>(set.size()));
  }
  const int64_t longest = *std::max_element(staged.counts.begin(), staged.counts.end());
  GatherTensor& tensor = staged.tensor;
  KEEPSET_ASSIGN_OR_RETURN(tensor.in, StageRows(state, task.in, kSource));
  KEEPSET_ASSIGN_OR_RETURN(
      staged.destination,
      StageDestination(state, task.out, std::max<int64_t>(longest, 1), kDestination));
  tensor.out = staged.destination.rows;
  tensor.row_bytes = static_cast<int32_t>(task.in.head_dim * DTypeBytes(task.in.dtype));
  tensor.unit_bytes = GatherUnitBytes(tensor.in, tensor.out, tensor.row_bytes);
  if (before == nullptr || !HaveTheSameSets(task, *task_before)) {
    KEEPSET_RETURN_IF_ERROR(UploadSets(state, task, &tensor));
    return staged;
  }
  // K and V of a layer.
  tensor.indices = before->tensor.indices;
  tensor.offsets = before->tensor.offsets;
  tensor.num_sets = before->tensor.num_sets;
  return staged;
}

// Launches what is staged, waits, and moves what goes to host memory there.
absl::Status RunGathers(StreamState& state, absl::Span<const GatherTask> tasks,
                        absl::Span<const StagedGather> staged) {
  std::vector<GatherTensor> tensors;
  GatherParams params;
  for (const StagedGather& one : staged) {
    tensors.push_back(one.tensor);
    params.most_heads = std::max(params.most_heads, one.tensor.in.num_heads);
    for (const int64_t count : one.counts) {
      params.longest = std::max(params.longest, static_cast<int32_t>(count));
    }
  }
  params.num_tensors = static_cast<int32_t>(tensors.size());
  KEEPSET_ASSIGN_OR_RETURN(params.tensors, UploadArray<GatherTensor>(state, tensors));
  KEEPSET_RETURN_IF_ERROR(
      state.Queue("gather", [&] { return LaunchGather(params, state.stream()); }));
  std::vector<PackedRows> packed;
  absl::Status queued;
  for (const StagedGather& one : staged) {
    absl::StatusOr<PackedRows> rows = QueueCopyBack(state, one.destination);
    queued.Update(rows.status());
    if (!queued.ok()) break;
    packed.push_back(*std::move(rows));
  }
  // Also after an error: the caller's memory and `packed` are in use until then.
  KEEPSET_RETURN_IF_ERROR(state.Wait());
  KEEPSET_RETURN_IF_ERROR(queued);
  for (size_t i = 0; i < staged.size(); ++i) {
    UnpackRows(staged[i].destination, packed[i], staged[i].counts, tasks[i].out);
  }
  return absl::OkStatus();
}

// The first of `tasks`, at most `most`, as far as there is memory for them. An error: there is none
// for the first.
absl::StatusOr<std::vector<StagedGather>> StageSome(StreamState& state,
                                                    absl::Span<const GatherTask> tasks,
                                                    size_t most) {
  std::vector<StagedGather> staged;
  for (size_t i = 0; i < std::min(most, tasks.size()); ++i) {
    if (i > 0 && state.has_many_temporaries()) break;
    absl::StatusOr<StagedGather> one = StageGather(
        state, tasks[i], i > 0 ? &staged.back() : nullptr, i > 0 ? &tasks[i - 1] : nullptr);
    if (i > 0 && absl::IsResourceExhausted(one.status())) break;
    if (!one.ok()) return NamedBy(tasks[i].what, one.status());
    staged.push_back(*std::move(one));
  }
  return staged;
}

}  // namespace

// Where memory is short fewer tasks go together, each after a wait that returns what those before
// it took.
absl::Status GatherRowsOfEach(StreamState& state, absl::Span<const GatherTask> tasks) {
  for (const GatherTask& task : tasks) {
    KEEPSET_RETURN_IF_ERROR(NamedBy(task.what, CheckGatherTask(state, task)));
  }
  if (tasks.empty()) return state.Wait();
  size_t most = kMaxGatherTensors;
  bool has_waited = false;
  for (size_t first = 0; first < tasks.size();) {
    const absl::Span<const GatherTask> left = tasks.subspan(first);
    absl::StatusOr<std::vector<StagedGather>> staged = StageSome(state, left, most);
    absl::Status status = staged.status();
    if (status.ok()) status = RunGathers(state, left.first(staged->size()), *staged);
    if (status.ok()) {
      first += staged->size();
      has_waited = true;
      continue;
    }
    // Without memory nothing was launched.
    const bool can_shrink = staged.ok() && staged->size() > 1;
    if (!absl::IsResourceExhausted(status) || (has_waited && !can_shrink)) return status;
    KEEPSET_RETURN_IF_ERROR(state.Wait());
    has_waited = true;
    if (can_shrink) most = staged->size() / 2;
  }
  return absl::OkStatus();
}

absl::Status GatherRows(StreamState& state, const KvView& in,
                        absl::Span<const absl::Span<const int32_t>> keep_indices,
                        const MutableKvView& out) {
  GatherTask task;
  task.in = in;
  task.keep_indices = keep_indices;
  task.out = out;
  KEEPSET_RETURN_IF_ERROR(CheckGatherTask(state, task));
  KEEPSET_ASSIGN_OR_RETURN(const StagedGather staged, StageGather(state, task, nullptr, nullptr));
  return RunGathers(state, absl::MakeConstSpan(&task, 1), absl::MakeConstSpan(&staged, 1));
}

}  // namespace keepset::kernels::cuda
