// What is measured: a CUDA backend, and what its device can do at most in the same run.
#ifndef KEEPSET_TESTS_GPU_BENCH_MACHINE_H_
#define KEEPSET_TESTS_GPU_BENCH_MACHINE_H_

#include <cuda_runtime_api.h>

#include <memory>

#include "kernels/compute_backend.h"
#include "tests/gpu/ceilings.h"

namespace keepset::gpu {

struct BenchMachine {
  kernels::ComputeBackend& backend;
  const Ceilings& ceilings;
  int repetitions = 1;
};

// Ends the program when there is none.
std::unique_ptr<kernels::OpContext> NewContext(const BenchMachine& machine);
// Of a context of the CUDA backend.
cudaStream_t StreamOf(kernels::OpContext& context);

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_BENCH_MACHINE_H_
