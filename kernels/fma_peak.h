// A measured yardstick for the arithmetic of the CPU backend.
#ifndef KEEPSET_KERNELS_FMA_PEAK_H_
#define KEEPSET_KERNELS_FMA_PEAK_H_

namespace keepset::kernels {

// fp32 multiply-add rate of `num_threads` threads together, in GFLOP/s (one multiply-add = 2),
// on the vector target that the CPU backend uses: register-resident independent chains, the best
// of several short runs. num_threads <= 0 means all cores this process may use. Takes about 50 ms.
double MeasureFmaPeakGflops(int num_threads);

}  // namespace keepset::kernels

#endif  // KEEPSET_KERNELS_FMA_PEAK_H_
