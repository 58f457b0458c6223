// Window scores of one layer at the 8B shape: 32 query heads, 8 KV heads, head_dim 128, 64 rows,
// bf16. Counters, of the best iteration: ns per (token x KV head), GFLOP/s (counting the logits
// only, 2 * rows * tokens * head_dim) and their share of the multiply-add peak measured in the same
// run; cpu_peak_percent is that share per second of processor time, which other load on the machine
// hardly changes.
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "benchmark/benchmark.h"
#include "kernels/backend_registry.h"
#include "kernels/compute_backend.h"
#include "kernels/fma_peak.h"

namespace keepset::kernels {
namespace {

constexpr int64_t kQoHeads = 32;
constexpr int64_t kKvHeads = 8;
constexpr int64_t kHeadDim = 128;
constexpr int64_t kRows = 64;

// bf16 values in [-1, 1].
std::vector<uint16_t> RandomBfloats(int64_t count) {
  std::mt19937 rng(1);
  std::vector<uint16_t> values(count);
  for (uint16_t& value : values) {
    const uint32_t bits = rng();
    value = static_cast<uint16_t>((bits & 0x807fu) | ((120u + (bits >> 16) % 7u) << 7));
  }
  return values;
}

double LayerFlops(int64_t seq_len) {
  return 2.0 * kQoHeads * kRows * kHeadDim * static_cast<double>(seq_len);
}

double ProcessCpuSeconds() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

void Report(benchmark::State& state, int64_t seq_len, int num_threads, double best_seconds,
            double best_cpu_seconds) {
  const double gflops = LayerFlops(seq_len) / best_seconds * 1e-9;
  state.counters["ns_per_token_kv_head"] =
      best_seconds * 1e9 / static_cast<double>(seq_len * kKvHeads);
  state.counters["gflops"] = gflops;
  state.counters["peak_percent"] = 100.0 * gflops / MeasureFmaPeakGflops(num_threads);
  state.counters["cpu_peak_percent"] =
      100.0 * LayerFlops(seq_len) / best_cpu_seconds * 1e-9 / MeasureFmaPeakGflops(1);
  state.counters["best_ms"] = best_seconds * 1e3;
}

// The whole op. range: tokens, threads, 1 with a given log-sum-exp, 1 with a new context (and so
// new scratch memory) for each call.
void BM_WindowColumns(benchmark::State& state) {
  const int64_t seq_len = state.range(0);
  BackendOptions options;
  options.num_threads = static_cast<int>(state.range(1));
  auto backend = NewBackend("cpu", options);
  auto context = (*backend)->NewContext();
  auto out = (*backend)->NewBuffer(kQoHeads, seq_len);
  const std::vector<uint16_t> q = RandomBfloats(kQoHeads * kRows * kHeadDim);
  const std::vector<uint16_t> k = RandomBfloats(kKvHeads * seq_len * kHeadDim);
  const std::vector<float> lse(kQoHeads * kRows, 8.0f);
  std::vector<int64_t> row_positions(kRows);
  std::iota(row_positions.begin(), row_positions.end(), seq_len - kRows);
  WindowArgs args;
  args.q.data = reinterpret_cast<const std::byte*>(q.data());
  args.q.size_bytes = static_cast<int64_t>(q.size() * 2);
  args.q.dtype = DType::kBF16;
  args.q.num_qo_heads = kQoHeads;
  args.q.num_rows = kRows;
  args.q.head_dim = kHeadDim;
  args.q.head_stride = kRows * kHeadDim;
  args.q.row_stride = kHeadDim;
  args.k.data = reinterpret_cast<const std::byte*>(k.data());
  args.k.size_bytes = static_cast<int64_t>(k.size() * 2);
  args.k.dtype = DType::kBF16;
  args.k.num_kv_heads = kKvHeads;
  args.k.seq_len = seq_len;
  args.k.head_dim = kHeadDim;
  args.k.head_stride = kHeadDim;
  args.k.token_stride = kKvHeads * kHeadDim;
  if (state.range(2) == 1) {
    args.window_lse.data = reinterpret_cast<const std::byte*>(lse.data());
    args.window_lse.size_bytes = static_cast<int64_t>(lse.size() * 4);
    args.window_lse.num_qo_heads = kQoHeads;
    args.window_lse.num_rows = kRows;
    args.window_lse.head_stride = kRows;
  }
  args.row_positions = row_positions;
  args.softmax_scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  args.what = "bench";
  double best = 1e30;
  double best_cpu = 1e30;
  for (auto _ : state) {
    const double cpu_start = ProcessCpuSeconds();
    const auto start = std::chrono::steady_clock::now();
    if (state.range(3) == 1) {
      context->reset();
      context = (*backend)->NewContext();
    }
    const absl::Status status = (*backend)->WindowColumns(**context, args, **out);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    if (!status.ok()) {
      state.SkipWithError(std::string(status.message()).c_str());
      return;
    }
    best = std::min(best, elapsed.count());
    best_cpu = std::min(best_cpu, ProcessCpuSeconds() - cpu_start);
  }
  Report(state, seq_len, options.num_threads, best, best_cpu);
}
BENCHMARK(BM_WindowColumns)
    ->ArgNames({"tokens", "threads", "lse", "new_context"})
    ->ArgsProduct({{1024, 4096, 8192}, {1, 2}, {0, 1}, {0}})
    ->ArgsProduct({{1024, 8192, 32768}, {1}, {0}, {1}})
    ->Args({32768, 1, 0, 0})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

// The logits alone: every query row of one KV head against freshly packed chunks of K.
void BM_Logits(benchmark::State& state) {
  const int num_threads = static_cast<int>(state.range(0));
  double best = 0.0;
  for (auto _ : state) {
    best = std::max(best, MeasureLogitsGflops(num_threads, kQoHeads / kKvHeads * kRows, kHeadDim));
  }
  state.counters["gflops"] = best;
  state.counters["peak_percent"] = 100.0 * best / MeasureFmaPeakGflops(num_threads);
}
BENCHMARK(BM_Logits)->ArgNames({"threads"})->Arg(1)->Arg(2)->Iterations(5);

void BM_FmaPeak(benchmark::State& state) {
  double best = 0.0;
  for (auto _ : state) {
    best = std::max(best, MeasureFmaPeakGflops(static_cast<int>(state.range(0))));
  }
  state.counters["gflops"] = best;
}
BENCHMARK(BM_FmaPeak)->ArgNames({"threads"})->Arg(1)->Arg(2)->Iterations(5);

}  // namespace
}  // namespace keepset::kernels
