#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "tests/gpu/ceilings.h"

namespace keepset::gpu {
namespace {

constexpr int kRepetitions = 10;
constexpr int kChains = 8;  // independent exponentials of a thread
constexpr int kSteps = 4096;

#define KEEPSET_TRY(call)                                                                 \
  do {                                                                                    \
    const cudaError_t error = (call);                                                     \
    if (error != cudaSuccess) return std::string(#call ": ") + cudaGetErrorString(error); \
  } while (false)

__global__ void EmptyKernel() {}

__global__ void Exp2Kernel(float* out) {
  float x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = -0.5f - 0.001f * static_cast<float>(threadIdx.x + i);
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
      // 2^x of x in (-1, 0) lies in (0.5, 1): negated it is the next argument.
      asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i]));
      x[i] = -x[i];
    }
  }
  float sum = 0.0f;
  for (int i = 0; i < kChains; ++i) sum += x[i];
  if (sum > 0.0f) out[0] = sum;
}

// bf16 values in (-1, 1): products of zeros would run faster than those of a model.
__global__ void FillKernel(uint16_t* out, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    uint32_t bits = static_cast<uint32_t>(i) * 2654435761u;
    bits ^= bits >> 15;
    bits *= 2246822519u;
    out[i] = static_cast<uint16_t>((bits & 0x807fu) | 0x3f00u);
  }
}

template <typename Work>
std::string BestMilliseconds(Work work, double* best) {
  cudaEvent_t begin;
  cudaEvent_t end;
  KEEPSET_TRY(cudaEventCreate(&begin));
  KEEPSET_TRY(cudaEventCreate(&end));
  *best = 1e30;
  for (int i = 0; i < kRepetitions; ++i) {
    KEEPSET_TRY(cudaEventRecord(begin));
    work();
    KEEPSET_TRY(cudaEventRecord(end));
    KEEPSET_TRY(cudaEventSynchronize(end));
    KEEPSET_TRY(cudaGetLastError());
    float milliseconds = 0.0f;
    KEEPSET_TRY(cudaEventElapsedTime(&milliseconds, begin, end));
    *best = std::min<double>(*best, milliseconds);
  }
  KEEPSET_TRY(cudaEventDestroy(begin));
  KEEPSET_TRY(cudaEventDestroy(end));
  return {};
}

std::string MeasureCopy(double* gb_per_s) {
  size_t free_bytes = 0;
  size_t all_bytes = 0;
  KEEPSET_TRY(cudaMemGetInfo(&free_bytes, &all_bytes));
  const size_t bytes = std::min<size_t>(size_t{4} << 30, free_bytes / 4);
  void* from = nullptr;
  void* to = nullptr;
  KEEPSET_TRY(cudaMalloc(&from, bytes));
  KEEPSET_TRY(cudaMalloc(&to, bytes));
  KEEPSET_TRY(cudaMemset(from, 1, bytes));
  double milliseconds = 0.0;
  const std::string error = BestMilliseconds(
      [&] { cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice); }, &milliseconds);
  *gb_per_s = 2.0 * static_cast<double>(bytes) / (milliseconds * 1e6);
  KEEPSET_TRY(cudaFree(from));
  KEEPSET_TRY(cudaFree(to));
  return error;
}

std::string MeasureExp2(double* per_ns) {
  constexpr int kThreads = 256;
  constexpr int kBlocksPerMultiprocessor = 8;
  int device = 0;
  int multiprocessors = 0;
  KEEPSET_TRY(cudaGetDevice(&device));
  KEEPSET_TRY(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  float* out = nullptr;
  KEEPSET_TRY(cudaMalloc(&out, sizeof(float)));
  const int blocks = multiprocessors * kBlocksPerMultiprocessor;
  double milliseconds = 0.0;
  const std::string error =
      BestMilliseconds([&] { Exp2Kernel<<<blocks, kThreads>>>(out); }, &milliseconds);
  *per_ns = static_cast<double>(blocks) * kThreads * kChains * kSteps / (milliseconds * 1e6);
  KEEPSET_TRY(cudaFree(out));
  return error;
}

// Overloaded in C++, one function in the library.
using GemmEx = cublasStatus_t(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int,
                              const void*, const void*, cudaDataType, int, const void*,
                              cudaDataType, int, const void*, void*, cudaDataType, int,
                              cublasComputeType_t, cublasGemmAlgo_t);

// cuBLAS is no part of the bundle: half a gigabyte that many machines have anyway.
std::string MeasureGemm(Ceilings* ceilings) {
  void* library = nullptr;
  for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
    library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
  }
  if (library == nullptr) {
    ceilings->gemm_note = "no libcublas found";
    return {};
  }
  const auto create =
      reinterpret_cast<decltype(&cublasCreate_v2)>(dlsym(library, "cublasCreate_v2"));
  const auto gemm = reinterpret_cast<GemmEx*>(dlsym(library, "cublasGemmEx"));
  cublasHandle_t handle = nullptr;
  if (create == nullptr || gemm == nullptr || create(&handle) != CUBLAS_STATUS_SUCCESS) {
    ceilings->gemm_note = "libcublas refuses this device";
    return {};
  }
  constexpr int64_t kSize = 8192;
  constexpr size_t kBytes = kSize * kSize * sizeof(uint16_t);
  uint16_t* matrices[3] = {};
  for (uint16_t*& matrix : matrices) {
    KEEPSET_TRY(cudaMalloc(&matrix, kBytes));
    FillKernel<<<1024, 256>>>(matrix, kSize * kSize);
  }
  const float alpha = 1.0f;
  const float beta = 0.0f;
  bool is_done = true;
  double milliseconds = 0.0;
  std::string error = BestMilliseconds(
      [&] {
        is_done = is_done && gemm(handle, CUBLAS_OP_T, CUBLAS_OP_N, kSize, kSize, kSize, &alpha,
                                  matrices[0], CUDA_R_16BF, kSize, matrices[1], CUDA_R_16BF, kSize,
                                  &beta, matrices[2], CUDA_R_16BF, kSize, CUBLAS_COMPUTE_32F,
                                  CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS;
      },
      &milliseconds);
  for (uint16_t* matrix : matrices) KEEPSET_TRY(cudaFree(matrix));
  if (!is_done) {
    ceilings->gemm_note = "cublasGemmEx failed";
    return error;
  }
  ceilings->gemm_tflops = 2.0 * kSize * kSize * kSize / (milliseconds * 1e9);
  return error;
}

std::string MeasureLaunch(double* microseconds) {
  double milliseconds = 0.0;
  const std::string error = BestMilliseconds([] { EmptyKernel<<<1, 32>>>(); }, &milliseconds);
  *microseconds = milliseconds * 1e3;
  return error;
}

}  // namespace

std::string MeasureCeilings(Ceilings* ceilings) {
  for (const std::string& error :
       {MeasureCopy(&ceilings->copy_gb_per_s), MeasureExp2(&ceilings->exp2_per_ns),
        MeasureLaunch(&ceilings->launch_us), MeasureGemm(ceilings)}) {
    if (!error.empty()) return error;
  }
  return {};
}

}  // namespace keepset::gpu
