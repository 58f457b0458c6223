// A libcublas.so of plain loops, loaded as the real one is: products are queued on an emulated
// stream and formed when it runs them.
//
// What it imitates of the library: setting the stream puts the shared workspace back, so that the
// caller's own has to be set after it; the workspace holds nothing of use afterwards; leading
// dimensions are checked, and that results of a batch do not overlap; a result that is not asked to
// be kept (beta = 0) is not read; a handle is of the device that was current when it was made,
// which has to be current when it is used and when it ends. Built with
// FAKE_CUBLAS_WITHOUT_WORKSPACE it lacks cublasSetWorkspace_v2, as versions before 11 do.
#include "tests/fakes/fake_libcublas.h"

#include <cublas_v2.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/element.h"
#include "kernels/views.h"

namespace {

using keepset::fakes::FakeCublas;
using keepset::kernels::DType;

constexpr size_t kLeastWorkspace = 16 << 10;

FakeCublas& Control() {
  static auto* const control = new FakeCublas;
  return *control;
}

void Misused(const char* how) {
  if (Control().misuse.empty()) Control().misuse = how;
}

// Of `batch` matrices of n rows of m elements, rows `pitch` and matrices `stride` apart: one behind
// the other, or all of them within a pitch.
bool Overlap(int m, int n, int pitch, long long stride, int batch) {
  const bool is_behind = stride >= static_cast<long long>(n - 1) * pitch + m;
  const bool is_within = stride >= m && (batch - 1) * stride + m <= pitch;
  return batch > 1 && !is_behind && !is_within;
}

bool ToDType(cudaDataType type, DType* dtype) {
  if (type == CUDA_R_32F) *dtype = DType::kF32;
  if (type == CUDA_R_16F) *dtype = DType::kF16;
  if (type == CUDA_R_16BF) *dtype = DType::kBF16;
  return type == CUDA_R_32F || type == CUDA_R_16F || type == CUDA_R_16BF;
}

}  // namespace

struct cublasContext {
  int device = 0;
  cudaStream_t stream = nullptr;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  bool has_math_mode = false;
  bool forbids_atomics = false;
};

extern "C" {

FakeCublas* FakeCublasControl() { return &Control(); }

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
  if (Control().create_status != 0) return static_cast<cublasStatus_t>(Control().create_status);
  *handle = new cublasContext;
  (*handle)->device = Control().current_device();
  ++Control().handles;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
  if (Control().current_device() != handle->device) Misused("a handle that ends on another device");
  delete handle;
  --Control().handles;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  if (Control().stream_status != 0) return static_cast<cublasStatus_t>(Control().stream_status);
  handle->stream = stream;
  handle->workspace = nullptr;
  return CUBLAS_STATUS_SUCCESS;
}

#if !defined(FAKE_CUBLAS_WITHOUT_WORKSPACE)
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t bytes) {
  const int status = Control().workspace_status;
  if (status != 0) return static_cast<cublasStatus_t>(status);
  if (reinterpret_cast<uintptr_t>(workspace) % 256 != 0) return CUBLAS_STATUS_INVALID_VALUE;
  handle->workspace = workspace;
  handle->workspace_bytes = bytes;
  return CUBLAS_STATUS_SUCCESS;
}
#endif

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  handle->has_math_mode = (mode & CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION) != 0;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetAtomicsMode(cublasHandle_t handle, cublasAtomicsMode_t mode) {
  handle->forbids_atomics = mode == CUBLAS_ATOMICS_NOT_ALLOWED;
  return CUBLAS_STATUS_SUCCESS;
}

const char* cublasGetStatusString(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_NOT_INITIALIZED:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED:
      return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_EXECUTION_FAILED:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    default:
      return "another status";
  }
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t transa,
                                          cublasOperation_t transb, int m, int n, int k,
                                          const void* alpha, const void* a, cudaDataType a_type,
                                          int lda, long long stride_a, const void* b,
                                          cudaDataType b_type, int ldb, long long stride_b,
                                          const void* beta, void* c, cudaDataType c_type, int ldc,
                                          long long stride_c, int batch,
                                          cublasComputeType_t compute, cublasGemmAlgo_t algo) {
  FakeCublas& control = Control();
  if (control.gemm_status != 0) return static_cast<cublasStatus_t>(control.gemm_status);
  ++control.gemms;
  if (batch > control.largest_batch) control.largest_batch = batch;
  DType dtype = DType::kF32;
  if (m < 1 || n < 1 || k < 1 || batch < 1 || lda < k || ldb < k || ldc < m ||
      !ToDType(a_type, &dtype) || b_type != a_type || c_type != CUDA_R_32F) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const cublasComputeType_t wanted =
      a_type == CUDA_R_32F ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F;
  if (transa != CUBLAS_OP_T || transb != CUBLAS_OP_N || compute != wanted ||
      algo != CUBLAS_GEMM_DEFAULT || *static_cast<const float*>(alpha) != 1.0f ||
      *static_cast<const float*>(beta) != 0.0f) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  if (handle->workspace == nullptr || handle->workspace_bytes < kLeastWorkspace) {
    Misused("a product without a workspace of its stream");
  }
  if (!handle->has_math_mode || !handle->forbids_atomics) Misused("a product in a mode not set");
  if (control.current_device() != handle->device) Misused("a product on another device");
  if (Overlap(m, n, ldc, stride_c, batch)) Misused("products that overlap");
  const auto bytes = keepset::kernels::DTypeBytes(dtype);
  const cudaError_t error = control.queue(
      handle->stream, [=, workspace = handle->workspace, size = handle->workspace_bytes] {
        if (workspace != nullptr) std::memset(workspace, 0xff, size);
        for (long long matrix = 0; matrix < batch; ++matrix) {
          const std::byte* keys = static_cast<const std::byte*>(a) + matrix * stride_a * bytes;
          const std::byte* queries = static_cast<const std::byte*>(b) + matrix * stride_b * bytes;
          float* logits = static_cast<float*>(c) + matrix * stride_c;
          for (long long row = 0; row < n; ++row) {
            for (long long token = 0; token < m; ++token) {
              float sum = 0.0f;
              for (long long channel = 0; channel < k; ++channel) {
                using keepset::kernels::cuda::LoadElement;
                sum += LoadElement(keys, token * lda + channel, dtype) *
                       LoadElement(queries, row * ldb + channel, dtype);
              }
              logits[row * ldc + token] = sum;
            }
          }
        }
      });
  return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

}  // extern "C"
