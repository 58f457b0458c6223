// A synthetic engine: steps like those of decoding, many short kernels that read a model's weights.
#ifndef KEEPSET_TESTS_GPU_DECODE_LOOP_H_
#define KEEPSET_TESTS_GPU_DECODE_LOOP_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace keepset::gpu {

// Not thread-safe.
class DecodeLoop {
 public:
  DecodeLoop() = default;
  ~DecodeLoop();
  DecodeLoop(const DecodeLoop&) = delete;
  DecodeLoop& operator=(const DecodeLoop&) = delete;

  // Takes 1 GiB of device memory.
  cudaError_t Init();
  // One step, queued on a stream of its own and waited for: every weight is read once by 64
  // kernels.
  cudaError_t Step();

 private:
  cudaStream_t stream_ = nullptr;
  float* weights_ = nullptr;
  float* sums_ = nullptr;
};

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_DECODE_LOOP_H_
