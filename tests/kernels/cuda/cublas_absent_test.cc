// A build without cuBLAS' declarations says so to whoever asks for its window kernels.
#include <cuda_runtime_api.h>

#include "gtest/gtest.h"
#include "kernels/cuda/cublas_products.h"

// Of the runtime, which is not linked here.
extern "C" {
const char* cudaGetErrorName(cudaError_t /*error*/) { return ""; }
const char* cudaGetErrorString(cudaError_t /*error*/) { return ""; }
}

namespace keepset::kernels::cuda {
namespace {

TEST(CublasAbsent, AskingForItIsRefused) {
  const absl::Status status = CheckCublasIsBuilt();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(),
            "cuda: window_kernels=\"cublas\": not in this build (KEEPSET_CUBLAS=OFF, or a toolkit "
            "without cublas_v2.h), want a build with it or \"portable\"");
  DeviceHealth health;
  EXPECT_EQ(NewCublasProducts({}, health).status(), status);
}

}  // namespace
}  // namespace keepset::kernels::cuda
