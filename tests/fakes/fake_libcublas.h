// What tests see of fake_libcublas.cc: its exported FakeCublasControl() returns this.
#ifndef KEEPSET_TESTS_FAKES_FAKE_LIBCUBLAS_H_
#define KEEPSET_TESTS_FAKES_FAKE_LIBCUBLAS_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <string>

namespace keepset::fakes {

struct FakeCublas {
  // Work of an emulated stream; set before the first product.
  cudaError_t (*queue)(cudaStream_t stream, std::function<void()> work) = nullptr;
  // Of the calling thread; set before the first handle.
  int (*current_device)() = nullptr;
  int create_status = 0;     // what cublasCreate answers from now on
  int stream_status = 0;     // the same of cublasSetStream
  int workspace_status = 0;  // of cublasSetWorkspace
  int gemm_status = 0;       // of products
  int64_t handles = 0;       // not destroyed yet
  int64_t gemms = 0;
  int64_t largest_batch = 0;
  std::string misuse;  // the first call that the library's manual forbids
};

}  // namespace keepset::fakes

#endif  // KEEPSET_TESTS_FAKES_FAKE_LIBCUBLAS_H_
