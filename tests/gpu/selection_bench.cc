#include "tests/gpu/selection_bench.h"

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "kernels/cuda/cuda_context.h"
#include "kernels/cuda/row_ops.h"
#include "kernels/cuda/select.h"
#include "kernels/score_key.h"
#include "tests/gpu/bench_device.h"
#include "tests/gpu/bench_report.h"

namespace keepset::gpu {
namespace {

using kernels::DType;
using Json = nlohmann::ordered_json;

constexpr int64_t kKvHeads = 8;
constexpr int64_t kHeadDim = 128;
constexpr int64_t kElement = 2;

// Adds what the device takes for `launch` alone, and what a whole call takes by the host's clock.
double AddTimesOf(const BenchMachine& machine, kernels::OpContext& context,
                  const std::function<cudaError_t()>& launch, const std::function<void()>& call,
                  Json* line) {
  DeviceTimer timer(StreamOf(context));
  const DeviceTimes times = timer.Measure(
      machine.repetitions, [&] { Require(launch()); },
      [&] { Require(machine.backend.Wait(context)); });
  AddDeviceTimes(times, line);
  AddTimes("call_ms", RepeatHostMilliseconds(machine.repetitions, call), line);
  return Quantile(times.milliseconds, 0.5);
}

// `tokens` rows of each head of the `tensor`th tensor in memory, all heads of a token together.
template <typename View>
View Rows(const DeviceMemory& memory, int64_t tensor, int64_t tokens) {
  View view;
  view.size_bytes = tokens * kKvHeads * kHeadDim * kElement;
  view.data = memory.data() + tensor * view.size_bytes;
  view.dtype = DType::kBF16;
  view.num_kv_heads = kKvHeads;
  view.seq_len = tokens;
  view.head_dim = kHeadDim;
  view.head_stride = kHeadDim;
  view.token_stride = kKvHeads * kHeadDim;
  return view;
}

template <typename Device, typename View>
Device Described(const View& view) {
  Device rows;
  rows.data = view.data;
  rows.head_bytes = view.head_stride * kElement;
  rows.token_bytes = view.token_stride * kElement;
  rows.num_heads = static_cast<int32_t>(view.num_kv_heads);
  rows.num_tokens = static_cast<int32_t>(view.seq_len);
  rows.head_dim = static_cast<int32_t>(view.head_dim);
  rows.dtype = view.dtype;
  return rows;
}

}  // namespace

void BenchSelect(const BenchMachine& machine, int64_t rows, int64_t length, int64_t budget) {
  std::mt19937 rng(5);
  std::exponential_distribution<float> scores(1.0f);
  std::vector<float> values(static_cast<size_t>(rows * length));
  for (float& value : values) value = scores(rng) / static_cast<float>(length);
  const auto context = NewContext(machine);
  auto buffer = machine.backend.NewBuffer(rows, length);
  Require(buffer.status());
  Require(machine.backend.CopyFromHost(*context, values, **buffer));
  kernels::SelectArgs args;
  args.budget = budget;

  std::vector<kernels::cuda::SelectRowArgs> row_args(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) {
    row_args[row].scores = (*buffer)->data() + row * length;
    row_args[row].length = length;
    row_args[row].budget = budget;
    row_args[row].min_kept = args.min_kept;
    row_args[row].threshold_key = kernels::ScoreKey(args.threshold);
  }
  const auto device_args = OnDevice(row_args);
  const DeviceMemory results(rows * int64_t{sizeof(kernels::cuda::SelectRowResult)});
  const DeviceMemory indices(rows * budget * int64_t{sizeof(int32_t)});
  kernels::cuda::SelectParams params;
  params.rows = static_cast<int32_t>(rows);
  params.longest = length;
  params.args = reinterpret_cast<const kernels::cuda::SelectRowArgs*>(device_args->data());
  params.results = reinterpret_cast<kernels::cuda::SelectRowResult*>(results.data());
  params.keep_indices = reinterpret_cast<int32_t*>(indices.data());
  params.capacity = budget;
  Json line = {{"bench", "select"}, {"rows", rows}, {"length", length}, {"budget", budget}};
  const double milliseconds = AddTimesOf(
      machine, *context, [&] { return kernels::cuda::LaunchSelect(params, StreamOf(*context)); },
      [&] {
        Require(machine.backend.Select(*context, **buffer, absl::MakeConstSpan(&args, 1)).status());
      },
      &line);
  line["device_us"] = 1e3 * milliseconds;
  Report(line);
}

void BenchGather(const BenchMachine& machine, int64_t layers, int64_t seq_len, int64_t budget) {
  const int64_t tensors = 2 * layers;
  const int64_t source_bytes = tensors * seq_len * kKvHeads * kHeadDim * kElement;
  Json line = {{"bench", "gather"}, {"layers", layers}, {"seq_len", seq_len}, {"budget", budget}};
  const DeviceMemory from(source_bytes);
  const DeviceMemory to(tensors * budget * kKvHeads * kHeadDim * kElement);
  if (from.data() == nullptr || to.data() == nullptr) {
    line["skipped"] = "device memory";
    return Report(line);
  }
  FillRandom(from.data(), source_bytes, 6);
  const auto context = NewContext(machine);
  std::vector<int32_t> indices(static_cast<size_t>(budget));
  for (int64_t i = 0; i < budget; ++i) indices[i] = static_cast<int32_t>(i * seq_len / budget);
  const std::vector<absl::Span<const int32_t>> sets = {indices};
  std::vector<kernels::GatherTask> tasks;
  for (int64_t i = 0; i < tensors; ++i) {
    tasks.push_back({Rows<kernels::KvView>(from, i, seq_len), sets,
                     Rows<kernels::MutableKvView>(to, i, budget), "bench"});
  }

  const auto device_indices = OnDevice(indices);
  const auto device_offsets = OnDevice(std::vector<int32_t>{0, static_cast<int32_t>(budget)});
  std::vector<kernels::cuda::GatherTensor> described;
  for (const kernels::GatherTask& task : tasks) {
    kernels::cuda::GatherTensor& tensor = described.emplace_back();
    tensor.in = Described<kernels::cuda::DeviceRows>(task.in);
    tensor.out = Described<kernels::cuda::MutableDeviceRows>(task.out);
    tensor.indices = reinterpret_cast<const int32_t*>(device_indices->data());
    tensor.offsets = reinterpret_cast<const int32_t*>(device_offsets->data());
    tensor.row_bytes = kHeadDim * kElement;
    tensor.unit_bytes = kernels::cuda::GatherUnitBytes(tensor.in, tensor.out, tensor.row_bytes);
  }
  const auto device_tensors = OnDevice(described);
  kernels::cuda::GatherParams params;
  params.tensors = reinterpret_cast<const kernels::cuda::GatherTensor*>(device_tensors->data());
  params.num_tensors = static_cast<int32_t>(tensors);
  params.most_heads = kKvHeads;
  params.longest = static_cast<int32_t>(budget);
  const double milliseconds = AddTimesOf(
      machine, *context, [&] { return kernels::cuda::LaunchGather(params, StreamOf(*context)); },
      [&] { Require(machine.backend.GatherRowsOfEach(*context, tasks)); }, &line);
  const double moved = 2.0 * static_cast<double>(tensors * tasks.front().out.size_bytes);
  line["gb_per_s"] = moved / (milliseconds * 1e6);
  line["share_of_copy"] = moved / (milliseconds * 1e6) / machine.ceilings.copy_gb_per_s;
  Report(line);
}

}  // namespace keepset::gpu
