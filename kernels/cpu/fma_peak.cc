#include "kernels/fma_peak.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/cpu/chunk_shape.h"
#include "kernels/cpu/cpu_context.h"
#include "kernels/cpu/fma_chains_simd.h"
#include "kernels/cpu/logits_simd.h"
#include "kernels/cpu/pack_simd.h"

namespace keepset::kernels {
namespace {

// Many runs of about a millisecond: on a shared machine some of them are left alone.
constexpr int kRuns = 50;

// The best rate of `kRuns` runs of `work` on every thread at once; work(thread) returns its
// floating-point operations.
double BestGflops(int num_threads, absl::FunctionRef<double(int64_t thread)> work) {
  const std::unique_ptr<cpu::ThreadArena> arena = cpu::NewThreadArena(num_threads);
  std::vector<double> flops(num_threads, 0.0);
  double best = 0.0;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
    arena->ParallelFor(num_threads, [&](int64_t thread, int) { flops[thread] = work(thread); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    double total = 0.0;
    for (double part : flops) total += part;
    best = std::max(best, total / seconds.count() * 1e-9);
  }
  return best;
}

}  // namespace

double MeasureFmaPeakGflops(int num_threads) {
  if (num_threads <= 0) num_threads = cpu::NumUsableCores();
  constexpr int64_t kIterations = 8000;
  std::vector<float> sinks(num_threads, 0.0f);
  return BestGflops(num_threads, [&](int64_t thread) {
    float sink = 0.0f;
    const double flops = cpu::RunFmaChains(kIterations, &sink);
    sinks[thread] = sink;
    return flops;
  });
}

double MeasureLogitsGflops(int num_threads, int64_t num_rows, int64_t head_dim) {
  if (num_threads <= 0) num_threads = cpu::NumUsableCores();
  num_rows = std::max<int64_t>(num_rows, 1);
  head_dim = std::max<int64_t>(head_dim, 1);
  const int64_t blocks = (num_rows + cpu::kRowBlock - 1) / cpu::kRowBlock;
  const std::vector<float> queries(blocks * cpu::kRowBlock * head_dim, 0.5f);
  struct Work {
    std::vector<uint16_t> keys;
    std::vector<const std::byte*> rows;
    std::vector<float> staging;
    std::vector<float> panels;
    std::vector<float> logits;
  };
  std::vector<Work> works(num_threads);
  for (Work& work : works) {
    constexpr uint16_t kQuarter = 0x3e80;  // 0.25 in bf16
    work.keys.assign(cpu::kChunkTokens * head_dim, kQuarter);
    for (int64_t t = 0; t < cpu::kChunkTokens; ++t) {
      work.rows.push_back(reinterpret_cast<const std::byte*>(&work.keys[t * head_dim]));
    }
    work.staging.resize(cpu::StagingFloats(head_dim));
    work.panels.resize(cpu::kChunkTokens * head_dim);
    work.logits.resize(cpu::kRowBlock * cpu::kChunkTokens);
  }
  constexpr int kChunksPerRun = 4;
  return BestGflops(num_threads, [&](int64_t thread) {
    Work& work = works[thread];
    for (int chunk = 0; chunk < kChunksPerRun; ++chunk) {
      cpu::PackTokens(work.rows.data(), cpu::kChunkTokens, head_dim, DType::kBF16,
                      work.staging.data(), work.panels.data());
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block * cpu::kRowBlock;
        cpu::BlockLogits(&queries[begin * head_dim], std::min(cpu::kRowBlock, num_rows - begin),
                         work.panels.data(), cpu::kChunkTokens, head_dim, work.logits.data());
      }
    }
    return 2.0 * kChunksPerRun * static_cast<double>(num_rows * head_dim * cpu::kChunkTokens);
  });
}

}  // namespace keepset::kernels
