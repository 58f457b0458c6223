#include "tests/gpu/window_bench.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "tests/gpu/bench_device.h"
#include "tests/gpu/bench_report.h"

namespace keepset::gpu {
namespace {

using kernels::DType;
using Json = nlohmann::ordered_json;

constexpr int64_t kLayers = 32;
constexpr int64_t kQoHeads = 32;
constexpr int64_t kKvHeads = 8;
constexpr int64_t kPage = 16;
constexpr int64_t kElement = 2;
// Above the log-sum-exp of 131072 logits of random rows, which have variance 1.
constexpr float kGivenLse = 12.5f;

int64_t LayerBytes(const WindowCase& shape) {
  return shape.seq_len * kKvHeads * shape.head_dim * kElement;
}
int64_t QueryBytes(const WindowCase& shape) {
  return kQoHeads * shape.rows * shape.head_dim * kElement;
}

// K and V of as many layers as there is room for, the rest read them again.
class Prompt {
 public:
  explicit Prompt(const WindowCase& shape)
      : shape_(shape),
        distinct_(DistinctLayers(shape)),
        k_(distinct_ * LayerBytes(shape)),
        v_(distinct_ * LayerBytes(shape)),
        q_(QueryBytes(shape)),
        lse_(kQoHeads * shape.rows * int64_t{sizeof(float)}),
        table_(static_cast<size_t>(shape.seq_len / kPage)),
        positions_(static_cast<size_t>(shape.rows)) {
    if (!has_memory()) return;
    FillRandom(k_.data(), distinct_ * LayerBytes(shape), 1);
    FillRandom(v_.data(), distinct_ * LayerBytes(shape), 2);
    FillRandom(q_.data(), QueryBytes(shape), 3);
    const std::vector<float> lse(static_cast<size_t>(kQoHeads * shape.rows), kGivenLse);
    Require(
        cudaMemcpy(lse_.data(), lse.data(), lse.size() * sizeof(float), cudaMemcpyHostToDevice));
    Require(cudaDeviceSynchronize());
    std::iota(table_.begin(), table_.end(), 0);
    std::mt19937 rng(4);
    std::shuffle(table_.begin(), table_.end(), rng);
    std::iota(positions_.begin(), positions_.end(), shape.seq_len - shape.rows);
  }

  bool has_memory() const {
    return k_.data() != nullptr && v_.data() != nullptr && q_.data() != nullptr &&
           lse_.data() != nullptr;
  }
  int64_t distinct_layers() const { return distinct_; }

  kernels::WindowArgs Layer(int64_t layer, kernels::ScoreBuffer* value_norms) const {
    kernels::WindowArgs args;
    args.q.data = q_.data();
    args.q.size_bytes = QueryBytes(shape_);
    args.q.dtype = DType::kBF16;
    args.q.num_qo_heads = kQoHeads;
    args.q.num_rows = shape_.rows;
    args.q.head_dim = shape_.head_dim;
    args.q.head_stride = shape_.rows * shape_.head_dim;
    args.q.row_stride = shape_.head_dim;
    args.k = View(k_, layer);
    args.v = View(v_, layer);
    args.value_norms = value_norms;
    args.row_positions = positions_;
    if (shape_.lse == Lse::kGiven) {
      args.window_lse.data = lse_.data();
      args.window_lse.size_bytes = kQoHeads * shape_.rows * int64_t{sizeof(float)};
      args.window_lse.num_qo_heads = kQoHeads;
      args.window_lse.num_rows = shape_.rows;
      args.window_lse.head_stride = shape_.rows;
    }
    args.softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
    args.what = "bench";
    return args;
  }

 private:
  static int64_t DistinctLayers(const WindowCase& shape) {
    size_t free_bytes = 0;
    size_t all_bytes = 0;
    Require(cudaMemGetInfo(&free_bytes, &all_bytes));
    const int64_t room = static_cast<int64_t>(free_bytes) / 10 * 8;
    return std::clamp<int64_t>(room / (2 * LayerBytes(shape)), 1, kLayers);
  }

  kernels::KvView View(const DeviceMemory& memory, int64_t layer) const {
    kernels::KvView view;
    view.data = memory.data() + layer % distinct_ * LayerBytes(shape_);
    view.size_bytes = LayerBytes(shape_);
    view.dtype = DType::kBF16;
    view.num_kv_heads = kKvHeads;
    view.seq_len = shape_.seq_len;
    view.head_dim = shape_.head_dim;
    view.head_stride = shape_.head_dim;
    view.token_stride = kKvHeads * shape_.head_dim;
    if (shape_.pages == Pages::kPaged) {
      view.block_size = kPage;
      view.block_stride = kPage * view.token_stride;
      view.block_table = table_;
    }
    return view;
  }

  const WindowCase shape_;
  const int64_t distinct_;
  const DeviceMemory k_;
  const DeviceMemory v_;
  const DeviceMemory q_;
  const DeviceMemory lse_;
  std::vector<int32_t> table_;
  std::vector<int64_t> positions_;
};

// Adds the floors and how the time compares.
void AddFloors(const Ceilings& ceilings, const WindowCase& shape, double milliseconds, Json* line) {
  const double logits = static_cast<double>(kLayers * kQoHeads * shape.rows * shape.seq_len);
  const double bytes = 2.0 * static_cast<double>(kLayers * LayerBytes(shape));
  const double bytes_ms = bytes / (ceilings.copy_gb_per_s * 1e6);
  const double exp_ms = logits / (ceilings.exp2_per_ns * 1e6);
  const bool has_gemm = ceilings.gemm_tflops > 0.0;
  const double flops = 2.0 * logits * static_cast<double>(shape.head_dim);
  const double gemm_ms = has_gemm ? flops / (ceilings.gemm_tflops * 1e9) : 0.0;
  const double one_pass_ms = std::max({bytes_ms, exp_ms, gemm_ms});
  const double two_pass_ms = std::max({bytes_ms, 2.0 * exp_ms, 2.0 * gemm_ms});
  (*line)["one_pass_floor_ms"] = one_pass_ms;
  (*line)["two_pass_floor_ms"] = two_pass_ms;
  (*line)["floor_has_gemm"] = has_gemm;
  (*line)["ratio_to_one_pass"] = milliseconds / one_pass_ms;
  (*line)["ratio_to_two_pass"] = milliseconds / two_pass_ms;
}

}  // namespace

void BenchWindowScores(const BenchMachine& machine, const WindowCase& shape) {
  Json line = {{"bench", "window_scores"},
               {"seq_len", shape.seq_len},
               {"head_dim", shape.head_dim},
               {"rows", shape.rows},
               {"window_lse", shape.lse == Lse::kGiven},
               {"paged", shape.pages == Pages::kPaged},
               {"one_call", shape.calls == Calls::kAllLayers},
               {"layers", kLayers}};
  const Prompt prompt(shape);
  if (!prompt.has_memory()) {
    line["skipped"] = "device memory";
    return Report(line);
  }
  std::vector<std::unique_ptr<kernels::ScoreBuffer>> buffers;
  const auto new_buffer = [&](int64_t rows) {
    auto buffer = machine.backend.NewBuffer(rows, shape.seq_len);
    Require(buffer.status());
    buffers.push_back(*std::move(buffer));
    return buffers.back().get();
  };
  std::vector<kernels::WindowArgs> layers;
  std::vector<kernels::ScoreBuffer*> outs;
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    outs.push_back(new_buffer(kQoHeads));
    layers.push_back(prompt.Layer(layer, new_buffer(kKvHeads)));
  }
  const auto context = NewContext(machine);
  const auto queue = [&] {
    if (shape.calls == Calls::kAllLayers) {
      return Require(machine.backend.WindowColumnsOfLayers(*context, layers, outs));
    }
    for (size_t layer = 0; layer < layers.size(); ++layer) {
      Require(machine.backend.WindowColumns(*context, layers[layer], *outs[layer]));
    }
  };
  const auto wait = [&] { Require(machine.backend.Wait(*context)); };
  DeviceTimer timer(StreamOf(*context));
  const DeviceTimes times = timer.Measure(machine.repetitions, queue, wait);
  const std::string computed_by = machine.backend.NameFor(*context);
  line["computed_by"] = computed_by;
  line["path"] = WindowPath(computed_by);
  line["distinct_layers"] = prompt.distinct_layers();
  AddDeviceTimes(times, &line);
  AddTimes("call_ms",
           RepeatHostMilliseconds(machine.repetitions,
                                  [&] {
                                    queue();
                                    wait();
                                  }),
           &line);
  AddFloors(machine.ceilings, shape, Quantile(times.milliseconds, 0.5), &line);
  Report(line);
}

void BenchLogits(int64_t seq_len, int64_t head_dim) {
  double milliseconds = 0.0;
  std::string note;
  const std::string error = MeasureLogitsByGemm(
      {kLayers, kKvHeads, kQoHeads / kKvHeads * WindowCase().rows, seq_len, head_dim},
      &milliseconds, &note);
  if (!error.empty()) Require(absl::InternalError(error));
  Json line = {{"bench", "cublas_logits"}, {"seq_len", seq_len}, {"head_dim", head_dim}};
  if (note.empty()) {
    line["ms"] = milliseconds;
  } else {
    line["skipped"] = note;
  }
  Report(line);
}

}  // namespace keepset::gpu
