// Figures of the CUDA backend on this machine's device: JSON lines on stdout, a table on stderr.
//
//   gpu_bench --probe       the device as one JSON line
//   gpu_bench [--quick]     ceilings, then kernels against their floors
//   gpu_bench service ...   keepsetd beside it: service_bench.cc
//
// Exit codes: 0 done, 3 no device (stderr says why), 1 a call failed. Times are wall-clock around
// work that is queued and waited for, the median of several runs after a warm-up; prompts have the
// shape of an 8B model: 32 layers, 32 query and 8 KV heads, head dimension 128, 64 rows, bf16.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/backend_registry.h"
#include "kernels/compute_backend.h"
#include "nlohmann/json.hpp"
#include "tests/gpu/ceilings.h"
#include "tests/gpu/service_bench.h"

namespace keepset::gpu {
namespace {

using kernels::DType;

constexpr int kExitNoDevice = 3;
constexpr int64_t kLayers = 32;
constexpr int64_t kQoHeads = 32;
constexpr int64_t kKvHeads = 8;
constexpr int64_t kHeadDim = 128;
constexpr int64_t kRows = 64;
constexpr int64_t kPage = 16;
constexpr int64_t kElement = 2;

// Ends the program with the reason: a benchmark has nothing to go on with.
void Require(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "gpu_bench: %s\n", status.ToString().c_str());
  std::exit(1);
}

class DeviceMemory {
 public:
  explicit DeviceMemory(int64_t bytes) {
    if (cudaMalloc(&data_, static_cast<size_t>(bytes)) != cudaSuccess) data_ = nullptr;
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() {
    if (cudaFree(data_) != cudaSuccess) std::fprintf(stderr, "gpu_bench: cudaFree failed\n");
  }
  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  void* data_ = nullptr;
};

// One layer's keys or values. A few random rows, repeated with a stride that is odd.
void FillRandom(std::byte* data, int64_t bytes, uint32_t seed) {
  constexpr int64_t kChunk = int64_t{1} << 22;
  std::vector<uint16_t> values(kChunk / kElement + 1);
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  for (uint16_t& value : values) {
    const float x = normal(rng);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    value = static_cast<uint16_t>(bits >> 16);
  }
  for (int64_t at = 0; at < bytes; at += kChunk) {
    if (cudaMemcpy(data + at, values.data(), static_cast<size_t>(std::min(kChunk, bytes - at)),
                   cudaMemcpyHostToDevice) != cudaSuccess) {
      Require(absl::InternalError("cudaMemcpy"));
    }
  }
}

double MedianMilliseconds(int repetitions, const std::function<void()>& work) {
  work();
  work();
  std::vector<double> times;
  for (int i = 0; i < repetitions; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double, std::milli> elapsed =
        std::chrono::steady_clock::now() - begin;
    times.push_back(elapsed.count());
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

class Bench {
 public:
  // window_bench: name of the lines of window scores.
  Bench(std::unique_ptr<kernels::ComputeBackend> backend, const Ceilings& ceilings, int repetitions,
        std::string window_bench = "window_scores")
      : backend_(std::move(backend)),
        ceilings_(ceilings),
        repetitions_(repetitions),
        window_bench_(std::move(window_bench)) {
    auto context = backend_->NewContext();
    Require(context.status());
    context_ = *std::move(context);
  }

  enum class Lse { kComputed, kGiven };
  enum class Pages { kContiguous, kPaged };
  enum class Calls { kPerLayer, kAllLayers };

  // All layers of one prompt, queued, then one wait.
  void WindowScores(int64_t seq_len, Lse lse, Pages pages, Calls calls, int64_t head_dim) {
    const int64_t layer_bytes = seq_len * kKvHeads * head_dim * kElement;
    size_t free_bytes = 0;
    size_t all_bytes = 0;
    cudaMemGetInfo(&free_bytes, &all_bytes);
    const int64_t distinct = std::clamp<int64_t>(
        static_cast<int64_t>(free_bytes) * 8 / 10 / (2 * layer_bytes), 1, kLayers);
    const DeviceMemory k(distinct * layer_bytes);
    const DeviceMemory v(distinct * layer_bytes);
    const DeviceMemory q(kQoHeads * kRows * head_dim * kElement);
    const DeviceMemory given(kQoHeads * kRows * 4);
    if (k.data() == nullptr || v.data() == nullptr || q.data() == nullptr) {
      Report({{"bench", window_bench_}, {"seq_len", seq_len}, {"skipped", "device memory"}});
      return;
    }
    FillRandom(k.data(), distinct * layer_bytes, 1);
    FillRandom(v.data(), distinct * layer_bytes, 2);
    FillRandom(q.data(), kQoHeads * kRows * head_dim * kElement, 3);
    const std::vector<float> lse_values(kQoHeads * kRows, 12.0f);
    cudaMemcpy(given.data(), lse_values.data(), lse_values.size() * 4, cudaMemcpyHostToDevice);
    std::vector<int32_t> table(static_cast<size_t>(seq_len / kPage));
    std::iota(table.begin(), table.end(), 0);
    std::mt19937 rng(4);
    std::shuffle(table.begin(), table.end(), rng);
    std::vector<int64_t> positions(kRows);
    std::iota(positions.begin(), positions.end(), seq_len - kRows);
    std::vector<std::unique_ptr<kernels::ScoreBuffer>> columns;
    std::vector<std::unique_ptr<kernels::ScoreBuffer>> norms;
    std::vector<kernels::ScoreBuffer*> outs;
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      columns.push_back(NewBuffer(kQoHeads, seq_len));
      norms.push_back(NewBuffer(kKvHeads, seq_len));
      outs.push_back(columns.back().get());
    }
    const auto view = [&](const DeviceMemory& memory, int64_t layer) {
      kernels::KvView kv;
      kv.data = memory.data() + layer % distinct * layer_bytes;
      kv.size_bytes = layer_bytes;
      kv.dtype = DType::kBF16;
      kv.num_kv_heads = kKvHeads;
      kv.seq_len = seq_len;
      kv.head_dim = head_dim;
      kv.head_stride = head_dim;
      kv.token_stride = kKvHeads * head_dim;
      if (pages == Pages::kPaged) {
        kv.block_size = kPage;
        kv.block_stride = kPage * kv.token_stride;
        kv.block_table = table;
      }
      return kv;
    };
    std::vector<kernels::WindowArgs> layers;
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      kernels::WindowArgs args;
      args.q.data = q.data();
      args.q.size_bytes = kQoHeads * kRows * head_dim * kElement;
      args.q.dtype = DType::kBF16;
      args.q.num_qo_heads = kQoHeads;
      args.q.num_rows = kRows;
      args.q.head_dim = head_dim;
      args.q.head_stride = kRows * head_dim;
      args.q.row_stride = head_dim;
      args.k = view(k, layer);
      args.v = view(v, layer);
      args.value_norms = norms[layer].get();
      args.row_positions = positions;
      if (lse == Lse::kGiven) {
        args.window_lse.data = given.data();
        args.window_lse.size_bytes = kQoHeads * kRows * 4;
        args.window_lse.num_qo_heads = kQoHeads;
        args.window_lse.num_rows = kRows;
        args.window_lse.head_stride = kRows;
      }
      args.softmax_scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
      args.what = "bench";
      layers.push_back(args);
    }
    const double milliseconds = MedianMilliseconds(repetitions_, [&] {
      if (calls == Calls::kAllLayers) {
        Require(backend_->WindowColumnsOfLayers(*context_, layers, outs));
      } else {
        for (int64_t layer = 0; layer < kLayers; ++layer) {
          Require(backend_->WindowColumns(*context_, layers[layer], *outs[layer]));
        }
      }
      Require(backend_->Wait(*context_));
    });
    const double logits = static_cast<double>(kLayers) * kQoHeads * kRows * seq_len;
    const double passes = lse == Lse::kGiven ? 1.0 : 2.0;
    const double bytes_ms = 2.0 * kLayers * layer_bytes / (ceilings_.copy_gb_per_s * 1e6);
    const double exp_ms = passes * logits / (ceilings_.exp2_per_ns * 1e6);
    const double gemm_ms = ceilings_.gemm_tflops > 0.0
                               ? passes * 2.0 * logits * head_dim / (ceilings_.gemm_tflops * 1e9)
                               : 0.0;
    const double floor_ms = std::max({bytes_ms, exp_ms, gemm_ms});
    Report({{"bench", window_bench_},
            {"seq_len", seq_len},
            {"computed_by", backend_->NameFor(*context_)},
            {"head_dim", head_dim},
            {"window_lse", lse == Lse::kGiven},
            {"paged", pages == Pages::kPaged},
            {"one_call", calls == Calls::kAllLayers},
            {"layers", kLayers},
            {"distinct_layers", distinct},
            {"ms", milliseconds},
            {"floor_ms", floor_ms},
            {"floor_by", floor_ms == bytes_ms ? "bytes"
                         : floor_ms == exp_ms ? "exp2"
                                              : "gemm"},
            {"floor_has_gemm", ceilings_.gemm_tflops > 0.0},
            {"ratio", milliseconds / floor_ms}});
  }

  // cuBLAS as a peer, on every head dimension.
  static void Logits(int64_t seq_len, int64_t head_dim) {
    double milliseconds = 0.0;
    std::string note;
    const std::string error = MeasureLogitsByGemm(
        {kLayers, kKvHeads, kQoHeads / kKvHeads * kRows, seq_len, head_dim}, &milliseconds, &note);
    if (!error.empty()) Require(absl::InternalError(error));
    nlohmann::ordered_json line = {
        {"bench", "cublas_logits"}, {"seq_len", seq_len}, {"head_dim", head_dim}};
    if (note.empty()) {
      line["ms"] = milliseconds;
    } else {
      line["skipped"] = note;
    }
    Report(line);
  }

  void Select(int64_t rows, int64_t length, int64_t budget) {
    std::mt19937 rng(5);
    std::exponential_distribution<float> scores(1.0f);
    std::vector<float> values(static_cast<size_t>(rows * length));
    for (float& value : values) value = scores(rng) / static_cast<float>(length);
    auto buffer = backend_->NewBuffer(rows, length);
    Require(buffer.status());
    Require(backend_->CopyFromHost(*context_, values, **buffer));
    kernels::SelectArgs args;
    args.budget = budget;
    const double milliseconds = MedianMilliseconds(repetitions_, [&] {
      Require(backend_->Select(*context_, **buffer, absl::MakeConstSpan(&args, 1)).status());
    });
    Report({{"bench", "select"},
            {"rows", rows},
            {"length", length},
            {"budget", budget},
            {"us_with_copy_and_wait", milliseconds * 1e3}});
  }

  void Gather(int64_t seq_len, int64_t budget) {
    const int64_t bytes = seq_len * kKvHeads * kHeadDim * kElement;
    const DeviceMemory from(bytes);
    const DeviceMemory to(budget * kKvHeads * kHeadDim * kElement);
    if (from.data() == nullptr || to.data() == nullptr) return;
    FillRandom(from.data(), bytes, 6);
    kernels::KvView in;
    in.data = from.data();
    in.size_bytes = bytes;
    in.dtype = DType::kBF16;
    in.num_kv_heads = kKvHeads;
    in.seq_len = seq_len;
    in.head_dim = kHeadDim;
    in.head_stride = kHeadDim;
    in.token_stride = kKvHeads * kHeadDim;
    kernels::MutableKvView out;
    out.data = to.data();
    out.size_bytes = budget * kKvHeads * kHeadDim * kElement;
    out.dtype = DType::kBF16;
    out.num_kv_heads = kKvHeads;
    out.seq_len = budget;
    out.head_dim = kHeadDim;
    out.head_stride = kHeadDim;
    out.token_stride = kKvHeads * kHeadDim;
    std::vector<int32_t> indices(static_cast<size_t>(budget));
    for (int64_t i = 0; i < budget; ++i) indices[i] = static_cast<int32_t>(i * seq_len / budget);
    const std::vector<absl::Span<const int32_t>> sets = {indices};
    const double milliseconds = MedianMilliseconds(
        repetitions_, [&] { Require(backend_->GatherRows(*context_, in, sets, out)); });
    const double moved = 2.0 * static_cast<double>(out.size_bytes);
    Report({{"bench", "gather"},
            {"seq_len", seq_len},
            {"budget", budget},
            {"us_with_copy_and_wait", milliseconds * 1e3},
            {"gb_per_s", moved / (milliseconds * 1e6)},
            {"share_of_copy", moved / (milliseconds * 1e6) / ceilings_.copy_gb_per_s}});
  }

  static void Report(const nlohmann::ordered_json& line) {
    std::printf("%s\n", line.dump().c_str());
    std::fflush(stdout);
    std::string row;
    for (const auto& [key, value] : line.items()) {
      absl::StrAppend(&row, row.empty() ? "" : "  ", key == "bench" ? "" : absl::StrCat(key, "="),
                      value.is_string()         ? value.get<std::string>()
                      : value.is_number_float() ? absl::StrFormat("%.4g", value.get<double>())
                                                : value.dump());
    }
    std::fprintf(stderr, "%s\n", row.c_str());
  }

 private:
  std::unique_ptr<kernels::ScoreBuffer> NewBuffer(int64_t rows, int64_t cols) {
    auto buffer = backend_->NewBuffer(rows, cols);
    Require(buffer.status());
    return *std::move(buffer);
  }

  std::unique_ptr<kernels::ComputeBackend> backend_;
  std::unique_ptr<kernels::OpContext> context_;
  const Ceilings ceilings_;
  const int repetitions_;
  const std::string window_bench_;
};

// Hopper's own kernels against the same floors, all layers in one call.
void RunHopper(const Ceilings& ceilings, bool is_quick) {
  constexpr char kName[] = "window_scores_hopper";
  auto backend = kernels::NewBackend("cuda", {.window_kernels = "hopper"});
  if (!backend.ok()) {
    Bench::Report({{"bench", kName}, {"skipped", std::string(backend.status().message())}});
    return;
  }
  Bench bench(*std::move(backend), ceilings, is_quick ? 3 : 31, kName);
  for (const int64_t seq_len : {1024, 4096, 32768, 131072}) {
    if (is_quick && seq_len > 4096) continue;
    for (const auto lse : {Bench::Lse::kComputed, Bench::Lse::kGiven}) {
      for (const auto pages : {Bench::Pages::kContiguous, Bench::Pages::kPaged}) {
        bench.WindowScores(seq_len, lse, pages, Bench::Calls::kAllLayers, kHeadDim);
      }
    }
  }
}

int Main(absl::Span<const char* const> arguments) {
  const auto has = [&](absl::string_view flag) {
    return std::any_of(arguments.begin(), arguments.end(),
                       [&](const char* argument) { return argument == flag; });
  };
  if (!arguments.empty() && absl::string_view(arguments.front()) == "service") {
    return RunServiceBench(arguments.subspan(1));
  }
  auto backend = kernels::NewBackend("cuda", {});
  if (!backend.ok()) {
    std::fprintf(stderr, "%s\n", std::string(backend.status().message()).c_str());
    return kExitNoDevice;
  }
  const kernels::DeviceInfo device = (*backend)->Device();
  Bench::Report({{"bench", "device"},
                 {"backend", (*backend)->name()},
                 {"name", device.name},
                 {"uuid", device.uuid},
                 {"driver_supports_cuda", device.driver_version}});
  if (has("--probe")) return 0;
  Ceilings ceilings;
  if (const std::string error = MeasureCeilings(&ceilings); !error.empty()) {
    std::fprintf(stderr, "gpu_bench: %s\n", error.c_str());
    return 1;
  }
  Bench::Report({{"bench", "ceilings"},
                 {"copy_gb_per_s", ceilings.copy_gb_per_s},
                 {"exp2_per_ns", ceilings.exp2_per_ns},
                 {"gemm_tflops", ceilings.gemm_tflops},
                 {"gemm_note", ceilings.gemm_note},
                 {"launch_us", ceilings.launch_us}});
  const bool is_quick = has("--quick");
  Bench bench(*std::move(backend), ceilings, is_quick ? 3 : 31);
  for (const int64_t seq_len : {1024, 4096, 32768, 131072}) {
    if (is_quick && seq_len > 4096) continue;
    for (const auto lse : {Bench::Lse::kComputed, Bench::Lse::kGiven}) {
      for (const auto pages : {Bench::Pages::kContiguous, Bench::Pages::kPaged}) {
        for (const auto calls : {Bench::Calls::kPerLayer, Bench::Calls::kAllLayers}) {
          bench.WindowScores(seq_len, lse, pages, calls, kHeadDim);
        }
      }
    }
  }
  for (const int64_t seq_len : {4096, 32768}) {
    if (is_quick && seq_len > 4096) continue;
    for (const int64_t head_dim : {80, 96, 128, 192, 256}) {
      bench.WindowScores(seq_len, Bench::Lse::kComputed, Bench::Pages::kContiguous,
                         Bench::Calls::kAllLayers, head_dim);
      bench.Logits(seq_len, head_dim);
    }
  }
  RunHopper(ceilings, is_quick);
  bench.Select(32, 32768, 512);
  bench.Select(256, 32768, 512);
  bench.Select(1, 1 << 20, 8192);
  bench.Gather(32768, 512);
  bench.Gather(32768, 8192);
  return 0;
}

}  // namespace
}  // namespace keepset::gpu

int main(int argc, char** argv) {
  return keepset::gpu::Main(absl::MakeConstSpan(argv + 1, argc > 0 ? argc - 1 : 0));
}
