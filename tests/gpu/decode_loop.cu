#include <cstdint>

#include "tests/gpu/decode_loop.h"

namespace keepset::gpu {
namespace {

constexpr int kKernels = 64;
constexpr int64_t kWeights = int64_t{256} << 20;  // floats
constexpr int64_t kWeightsPerKernel = kWeights / kKernels;
constexpr int kBlocks = 256;
constexpr int kThreads = 256;

__global__ void ReadWeights(const float4* weights, int64_t count, float* sums) {
  float sum = 0.0f;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const float4 w = weights[i];
    sum += w.x + w.y + w.z + w.w;
  }
  sums[static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x] += sum;
}

}  // namespace

DecodeLoop::~DecodeLoop() {
  // A benchmark that ends; nothing is left to say to anybody.
  static_cast<void>(cudaFree(weights_));
  static_cast<void>(cudaFree(sums_));
  if (stream_ != nullptr) static_cast<void>(cudaStreamDestroy(stream_));
}

cudaError_t DecodeLoop::Init() {
  cudaError_t error = cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
  if (error == cudaSuccess) error = cudaMalloc(&weights_, kWeights * sizeof(float));
  if (error == cudaSuccess) error = cudaMalloc(&sums_, kBlocks * kThreads * sizeof(float));
  if (error == cudaSuccess) error = cudaMemset(weights_, 0, kWeights * sizeof(float));
  if (error == cudaSuccess) error = cudaMemset(sums_, 0, kBlocks * kThreads * sizeof(float));
  // Fills are queued on another stream than the loop's.
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  return error;
}

cudaError_t DecodeLoop::Step() {
  for (int kernel = 0; kernel < kKernels; ++kernel) {
    const float* first = weights_ + kernel * kWeightsPerKernel;
    ReadWeights<<<kBlocks, kThreads, 0, stream_>>>(reinterpret_cast<const float4*>(first),
                                                   kWeightsPerKernel / 4, sums_);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaStreamSynchronize(stream_);
}

}  // namespace keepset::gpu
