#include "tests/gpu/bench_machine.h"

#include <utility>

#include "kernels/cuda/cuda_context.h"
#include "tests/gpu/bench_device.h"

namespace keepset::gpu {

std::unique_ptr<kernels::OpContext> NewContext(const BenchMachine& machine) {
  auto context = machine.backend.NewContext();
  Require(context.status());
  // The first op would make the stream, which is asked for before.
  Require(static_cast<kernels::cuda::CudaContext&>(**context).state().Prepare());
  return *std::move(context);
}

cudaStream_t StreamOf(kernels::OpContext& context) {
  return static_cast<kernels::cuda::CudaContext&>(context).state().stream();
}

}  // namespace keepset::gpu
