// Measured yardsticks for the arithmetic of the CPU backend.
#ifndef KEEPSET_KERNELS_FMA_PEAK_H_
#define KEEPSET_KERNELS_FMA_PEAK_H_

#include <cstdint>

namespace keepset::kernels {

// fp32 multiply-add rate of `num_threads` threads together, in GFLOP/s (one multiply-add = 2),
// on the vector target that the CPU backend uses: register-resident independent chains, the best
// of several short runs. num_threads <= 0 means all cores this process may use. Takes about 50 ms.
double MeasureFmaPeakGflops(int num_threads);

// The logits part of the window scores alone, in GFLOP/s (2 * num_rows * head_dim per token): bf16
// chunks of K are widened, transposed and multiplied with the `num_rows` query rows that share a KV
// head. Each thread works on its own chunk; otherwise as above.
double MeasureLogitsGflops(int num_threads, int64_t num_rows, int64_t head_dim);

}  // namespace keepset::kernels

#endif  // KEEPSET_KERNELS_FMA_PEAK_H_
