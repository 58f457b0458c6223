// Kernels that prepare the device for a measurement.
#ifndef KEEPSET_TESTS_GPU_BENCH_KERNELS_H_
#define KEEPSET_TESTS_GPU_BENCH_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace keepset::gpu {

// Holds the stream up for so long.
cudaError_t QueueDelay(int64_t nanoseconds, cudaStream_t stream);

// Reads memory that holds zeros through the L2 cache. Reads, because lines that were written would
// be written back while the next work is timed.
cudaError_t QueueRead(std::byte* zeros, int64_t bytes, cudaStream_t stream);

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_BENCH_KERNELS_H_
