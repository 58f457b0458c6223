// Multiply-adds that wait for nothing, to measure their peak. Compiled once per SIMD target and
// chosen at run time. Nothing is allocated. Thread-safe.
#ifndef KEEPSET_KERNELS_CPU_FMA_CHAINS_SIMD_H_
#define KEEPSET_KERNELS_CPU_FMA_CHAINS_SIMD_H_

#include <cstdint>

namespace keepset::kernels::cpu {

// Runs about `iterations` * 1000 multiply-adds per lane in registers; returns the floating-point
// operations done and stores a value that depends on all of them.
double RunFmaChains(int64_t iterations, float* sink);

}  // namespace keepset::kernels::cpu

#endif  // KEEPSET_KERNELS_CPU_FMA_CHAINS_SIMD_H_
