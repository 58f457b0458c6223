// Window scores of one layer at the 8B shape: 32 query heads, 8 KV heads, head_dim 128, 64 rows,
// bf16. Counters: ns per (token x KV head), GFLOP/s of the logits (2 * rows * tokens * head_dim)
// and their share of the multiply-add peak measured in the same run.
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
#include "kernels/cpu/simd_kernels.h"
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

void Report(benchmark::State& state, int64_t seq_len, int num_threads, double best_seconds) {
  const double gflops = LayerFlops(seq_len) / best_seconds * 1e-9;
  state.counters["ns_per_token_kv_head"] =
      best_seconds * 1e9 / static_cast<double>(seq_len * kKvHeads);
  state.counters["gflops"] = gflops;
  state.counters["peak_percent"] = 100.0 * gflops / MeasureFmaPeakGflops(num_threads);
  state.counters["best_ms"] = best_seconds * 1e3;
}

// The whole op. range: tokens, threads, 1 with a given log-sum-exp.
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
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    const absl::Status status = (*backend)->WindowColumns(**context, args, **out);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    if (!status.ok()) {
      state.SkipWithError(std::string(status.message()).c_str());
      return;
    }
    best = std::min(best, elapsed.count());
  }
  Report(state, seq_len, options.num_threads, best);
}
BENCHMARK(BM_WindowColumns)
    ->ArgNames({"tokens", "threads", "lse"})
    ->ArgsProduct({{1024, 4096, 8192}, {1, 2}, {0, 1}})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

// The logits alone, one thread: every query row of one KV head against packed chunks of K.
void BM_Logits(benchmark::State& state) {
  const int64_t rows = kQoHeads / kKvHeads * kRows;
  const int64_t blocks = rows / cpu::kRowBlock;
  const std::vector<uint16_t> k = RandomBfloats(cpu::kChunkTokens * kHeadDim);
  std::vector<const std::byte*> pointers(cpu::kChunkTokens);
  for (int64_t t = 0; t < cpu::kChunkTokens; ++t) {
    pointers[t] = reinterpret_cast<const std::byte*>(&k[t * kHeadDim]);
  }
  std::vector<float> staging(cpu::StagingFloats(kHeadDim));
  std::vector<float> panels(cpu::kChunkTokens * kHeadDim);
  std::vector<float> queries(rows * kHeadDim, 0.5f);
  std::vector<float> logits(cpu::kRowBlock * cpu::kChunkTokens);
  const bool packs = state.range(0) == 1;
  cpu::PackTokens(pointers.data(), cpu::kChunkTokens, kHeadDim, DType::kBF16, staging.data(),
                  panels.data());
  double best = 1e30;
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    if (packs) {
      cpu::PackTokens(pointers.data(), cpu::kChunkTokens, kHeadDim, DType::kBF16, staging.data(),
                      panels.data());
    }
    for (int64_t b = 0; b < blocks; ++b) {
      cpu::BlockLogits(&queries[b * cpu::kRowBlock * kHeadDim], cpu::kRowBlock, panels.data(),
                       cpu::kChunkTokens, kHeadDim, logits.data());
      benchmark::DoNotOptimize(logits.data());
    }
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::min(best, elapsed.count());
  }
  const double flops = 2.0 * static_cast<double>(rows * cpu::kChunkTokens * kHeadDim);
  state.counters["gflops"] = flops / best * 1e-9;
  state.counters["peak_percent"] = 100.0 * flops / best * 1e-9 / MeasureFmaPeakGflops(1);
}
BENCHMARK(BM_Logits)->ArgNames({"pack"})->Arg(0)->Arg(1)->Unit(benchmark::kMicrosecond);

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
