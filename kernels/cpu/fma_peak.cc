#include "kernels/fma_peak.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "kernels/cpu/cpu_context.h"
#include "kernels/cpu/simd_kernels.h"

namespace keepset::kernels {

double MeasureFmaPeakGflops(int num_threads) {
  if (num_threads <= 0) num_threads = cpu::NumUsableCores();
  const std::unique_ptr<cpu::ThreadArena> arena = cpu::NewThreadArena(num_threads);
  constexpr int kRuns = 8;
  constexpr int64_t kIterations = 48000;  // a few milliseconds per run
  double best = 0.0;
  for (int run = 0; run < kRuns; ++run) {
    std::vector<float> sinks(num_threads, 0.0f);
    std::vector<double> flops(num_threads, 0.0);
    const auto start = std::chrono::steady_clock::now();
    arena->ParallelFor(num_threads, [&](int64_t task, int) {
      float sink = 0.0f;
      flops[task] = cpu::RunFmaChains(kIterations, &sink);
      sinks[task] = sink;
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    double total = 0.0;
    for (double f : flops) total += f;
    best = std::max(best, total / seconds.count() * 1e-9);
  }
  return best;
}

}  // namespace keepset::kernels
