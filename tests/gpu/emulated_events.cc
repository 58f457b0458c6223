// The rest of the CUDA runtime that gpu_bench calls, over the emulated one. Time passes by kernels:
// an event's time is how many were queued before it, and preparations of a measurement take long.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tests/gpu/bench_kernels.h"
#include "tests/kernels/cuda/emulated_runtime.h"

using keepset::kernels::cuda::CountLaunch;
using keepset::kernels::cuda::CountsSoFar;
using keepset::kernels::cuda::QueueEmulated;

struct CUevent_st {
  int64_t time = 0;
  bool is_reached = false;
};

namespace keepset::gpu {

cudaError_t QueueDelay(int64_t /*nanoseconds*/, cudaStream_t stream) {
  for (int i = 0; i < 1000; ++i) CountLaunch();
  return QueueEmulated(stream, [] {});
}

cudaError_t QueueRead(std::byte* /*zeros*/, int64_t /*bytes*/, cudaStream_t stream) {
  return QueueDelay(0, stream);
}

}  // namespace keepset::gpu

extern "C" {

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->time = CountsSoFar().launches;
  event->is_reached = false;
  return QueueEmulated(stream, [event] { event->is_reached = true; });
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  return event->is_reached ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaEventQuery(event); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  if (!begin->is_reached || !end->is_reached) return cudaErrorNotReady;
  *milliseconds = static_cast<float>(end->time - begin->time);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* data, int value, size_t bytes) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

}  // extern "C"
