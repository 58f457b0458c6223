#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "tests/gpu/ceilings.h"
#include "tests/gpu/cublas_functions.h"

namespace keepset::gpu {
namespace {

constexpr int kWarmUps = 3;
constexpr int kRepetitions = 21;
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

// bf16 values of a normal distribution, as those of a model: products of zeros, or of values with
// one exponent, would run faster.
__global__ void FillKernel(uint16_t* out, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    uint32_t bits = static_cast<uint32_t>(i) * 2654435761u;
    bits ^= bits >> 15;
    bits *= 2246822519u;
    bits ^= bits >> 13;
    // Box and Muller's transformation of 16 bits each.
    const float radius = static_cast<float>((bits >> 16) + 1) / 65536.0f;
    const float angle = static_cast<float>(bits & 0xffffu) / 32768.0f;
    const float value = sqrtf(-2.0f * logf(radius)) * cospif(angle);
    out[i] = static_cast<uint16_t>((__float_as_uint(value) + 0x8000u) >> 16);
  }
}

template <typename Work>
std::string MedianMilliseconds(Work work, double* median) {
  cudaEvent_t begin;
  cudaEvent_t end;
  KEEPSET_TRY(cudaEventCreate(&begin));
  KEEPSET_TRY(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = 0; i < kWarmUps + kRepetitions; ++i) {
    KEEPSET_TRY(cudaEventRecord(begin));
    work();
    KEEPSET_TRY(cudaEventRecord(end));
    KEEPSET_TRY(cudaEventSynchronize(end));
    KEEPSET_TRY(cudaGetLastError());
    float milliseconds = 0.0f;
    KEEPSET_TRY(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= kWarmUps) times.push_back(milliseconds);
  }
  std::nth_element(times.begin(), times.begin() + kRepetitions / 2, times.end());
  *median = times[kRepetitions / 2];
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
  const std::string error = MedianMilliseconds(
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
      MedianMilliseconds([&] { Exp2Kernel<<<blocks, kThreads>>>(out); }, &milliseconds);
  *per_ns = static_cast<double>(blocks) * kThreads * kChains * kSteps / (milliseconds * 1e6);
  KEEPSET_TRY(cudaFree(out));
  return error;
}

std::string MeasureGemm(Ceilings* ceilings) {
  CublasFunctions cublas;
  ceilings->gemm_note = OpenCublas(&cublas);
  if (!ceilings->gemm_note.empty()) return {};
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
  std::string error = MedianMilliseconds(
      [&] {
        is_done = is_done &&
                  cublas.gemm(cublas.handle, CUBLAS_OP_T, CUBLAS_OP_N, kSize, kSize, kSize, &alpha,
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
  const std::string error = MedianMilliseconds([] { EmptyKernel<<<1, 32>>>(); }, &milliseconds);
  *microseconds = milliseconds * 1e3;
  return error;
}

}  // namespace

std::string MeasureLogitsByGemm(const LogitsShape& shape, double* milliseconds, std::string* note) {
  CublasFunctions cublas;
  *note = OpenCublas(&cublas);
  if (!note->empty()) return {};
  const int64_t k_values = shape.num_kv_heads * shape.seq_len * shape.head_dim;
  const int64_t q_values = shape.num_kv_heads * shape.rows * shape.head_dim;
  const int64_t logits = shape.num_kv_heads * shape.rows * shape.seq_len;
  uint16_t* memory = nullptr;
  KEEPSET_TRY(cudaMalloc(&memory, static_cast<size_t>(k_values + q_values + logits) * 2));
  FillKernel<<<1024, 256>>>(memory, k_values + q_values);
  uint16_t* const q = memory + k_values;
  uint16_t* const out = q + q_values;
  const auto rows = static_cast<int>(shape.rows);
  const auto tokens = static_cast<int>(shape.seq_len);
  const auto dim = static_cast<int>(shape.head_dim);
  const float alpha = 1.0f;
  const float beta = 0.0f;
  bool is_done = true;
  const std::string error = MedianMilliseconds(
      [&] {
        for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
          is_done = is_done &&
                    cublas.batched_gemm(cublas.handle, CUBLAS_OP_T, CUBLAS_OP_N, tokens, rows, dim,
                                        &alpha, memory, CUDA_R_16BF, dim, int64_t{tokens} * dim, q,
                                        CUDA_R_16BF, dim, int64_t{rows} * dim, &beta, out,
                                        CUDA_R_16BF, tokens, int64_t{tokens} * rows,
                                        static_cast<int>(shape.num_kv_heads), CUBLAS_COMPUTE_32F,
                                        CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS;
        }
      },
      milliseconds);
  KEEPSET_TRY(cudaFree(memory));
  if (!is_done) *note = "cublasGemmStridedBatchedEx failed";
  return error;
}

std::string MeasureCeilings(Ceilings* ceilings) {
  for (const std::string& error :
       {MeasureCopy(&ceilings->copy_gb_per_s), MeasureExp2(&ceilings->exp2_per_ns),
        MeasureLaunch(&ceilings->launch_us), MeasureGemm(ceilings)}) {
    if (!error.empty()) return error;
  }
  return {};
}

}  // namespace keepset::gpu
