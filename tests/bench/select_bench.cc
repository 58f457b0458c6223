// Selection of 512 positions from rows of random scores: 32 rows as a layer-wide decision of 32
// layers makes, one row as a single layer does.
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "benchmark/benchmark.h"
#include "kernels/backend_registry.h"
#include "kernels/compute_backend.h"

namespace keepset::kernels {
namespace {

// range: rows, positions, threads.
void BM_Select(benchmark::State& state) {
  const int64_t rows = state.range(0);
  const int64_t cols = state.range(1);
  BackendOptions options;
  options.num_threads = static_cast<int>(state.range(2));
  auto backend = NewBackend("cpu", options);
  auto context = (*backend)->NewContext();
  auto scores = (*backend)->NewBuffer(rows, cols);
  std::mt19937 rng(1);
  std::exponential_distribution<float> value(1.0f);
  std::vector<float> host(rows * cols);
  for (float& score : host) score = value(rng);
  benchmark::DoNotOptimize((*backend)->CopyFromHost(**context, host, **scores));
  SelectArgs args;
  args.budget = 512;
  for (auto _ : state) {
    auto selections = (*backend)->Select(**context, **scores, {&args, 1});
    if (!selections.ok()) {
      state.SkipWithError("select failed");
      return;
    }
    benchmark::DoNotOptimize(selections->data());
  }
  state.SetItemsProcessed(state.iterations() * rows * cols);
}
BENCHMARK(BM_Select)
    ->ArgNames({"rows", "positions", "threads"})
    ->ArgsProduct({{1, 32}, {4096, 32768}, {1, 2}})
    ->Unit(benchmark::kMicrosecond)
    ->UseRealTime();

}  // namespace
}  // namespace keepset::kernels
