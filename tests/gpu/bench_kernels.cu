#include <cuda_runtime.h>

#include "tests/gpu/bench_kernels.h"

namespace keepset::gpu {
namespace {

constexpr int kReadBlocks = 512;
constexpr int kReadThreads = 256;

__global__ void DelayKernel(int64_t nanoseconds) {
  uint64_t begin;
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - begin < static_cast<uint64_t>(nanoseconds));
}

__global__ void ReadKernel(const float4* values, int64_t count, float4* sink) {
  float sum = 0.0f;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const float4 value = values[i];
    sum += value.x + value.y + value.z + value.w;
  }
  // The memory holds zeros: never, but the compiler cannot know.
  if (sum != 0.0f) sink->x = sum;
}

}  // namespace

cudaError_t QueueDelay(int64_t nanoseconds, cudaStream_t stream) {
  DelayKernel<<<1, 1, 0, stream>>>(nanoseconds);
  return cudaGetLastError();
}

cudaError_t QueueRead(std::byte* zeros, int64_t bytes, cudaStream_t stream) {
  auto* const values = reinterpret_cast<float4*>(zeros);
  ReadKernel<<<kReadBlocks, kReadThreads, 0, stream>>>(values, bytes / int64_t{sizeof(float4)},
                                                       values);
  return cudaGetLastError();
}

}  // namespace keepset::gpu
