// The linker puts this in the place of cudaMalloc (--wrap): new device memory holds bytes of 0xff,
// as on the emulator, so that what an op leaves unwritten reads as NaN. KEEPSET_UNPOISONED, if set,
// leaves it unwritten, for tools that find reads of such memory themselves.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdlib>

extern "C" {

cudaError_t __real_cudaMalloc(void** data, size_t bytes);

cudaError_t __wrap_cudaMalloc(void** data, size_t bytes) {
  cudaError_t error = __real_cudaMalloc(data, bytes);
  if (error != cudaSuccess || std::getenv("KEEPSET_UNPOISONED") != nullptr) return error;
  error = cudaMemset(*data, 0xff, bytes);
  // The fill is queued on another stream than those of the backend.
  return error == cudaSuccess ? cudaDeviceSynchronize() : error;
}

}  // extern "C"
