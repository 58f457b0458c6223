// cuBLAS for the ceilings: no part of the bundle, half a gigabyte that many machines have anyway.
#ifndef KEEPSET_TESTS_GPU_CUBLAS_FUNCTIONS_H_
#define KEEPSET_TESTS_GPU_CUBLAS_FUNCTIONS_H_

#include <cublas_v2.h>

#include <string>

namespace keepset::gpu {

// Overloaded in C++, one function each in the library.
using GemmEx = cublasStatus_t(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int,
                              const void*, const void*, cudaDataType, int, const void*,
                              cudaDataType, int, const void*, void*, cudaDataType, int,
                              cublasComputeType_t, cublasGemmAlgo_t);
using BatchedGemmEx = cublasStatus_t(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int,
                                     int, const void*, const void*, cudaDataType, int, long long,
                                     const void*, cudaDataType, int, long long, const void*, void*,
                                     cudaDataType, int, long long, int, cublasComputeType_t,
                                     cublasGemmAlgo_t);

// Not copyable: the handle ends with it.
struct CublasFunctions {
  CublasFunctions() = default;
  CublasFunctions(const CublasFunctions&) = delete;
  CublasFunctions& operator=(const CublasFunctions&) = delete;
  ~CublasFunctions();

  decltype(cublasDestroy_v2)* destroy = nullptr;
  GemmEx* gemm = nullptr;
  BatchedGemmEx* batched_gemm = nullptr;
  cublasHandle_t handle = nullptr;  // of the current device
};

// Empty, or why there is none.
std::string OpenCublas(CublasFunctions* functions);

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_CUBLAS_FUNCTIONS_H_
