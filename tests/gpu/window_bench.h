// Window scores of all layers of an 8B model against their floors: K and V once through memory, the
// exponentials, and the products, each at the ceiling of the same run, whichever takes longest. The
// floors leave out what is written (scores and value norms, 160 bytes per token and layer beside
// 4,096 of K and V with head_dim 128) and that keys may be read twice.
#ifndef KEEPSET_TESTS_GPU_WINDOW_BENCH_H_
#define KEEPSET_TESTS_GPU_WINDOW_BENCH_H_

#include <cstdint>
#include <string>

#include "tests/gpu/bench_machine.h"

namespace keepset::gpu {

enum class Lse { kComputed, kGiven };
enum class Pages { kContiguous, kPaged };
enum class Calls { kPerLayer, kAllLayers };

struct WindowCase {
  int64_t seq_len = 0;
  int64_t head_dim = 128;
  Lse lse = Lse::kComputed;
  Pages pages = Pages::kContiguous;
  Calls calls = Calls::kAllLayers;
  int64_t rows = 64;  // observed rows of a head
};

// Reports one line. Its `path` says which kernels computed.
void BenchWindowScores(const BenchMachine& machine, const WindowCase& shape);

// cuBLAS' products alone of the same shape, as a floor of what goes through it.
void BenchLogits(int64_t seq_len, int64_t head_dim);

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_WINDOW_BENCH_H_
