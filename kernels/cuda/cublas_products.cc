#include "kernels/cuda/cublas_products.h"

#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

#if defined(KEEPSET_HAS_CUBLAS)

#include <cublas_v2.h>

#include <algorithm>
#include <vector>

#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "base/status_macros.h"
#include "kernels/cuda/cublas_file.h"
#include "kernels/cuda/current_device.h"

namespace keepset::kernels::cuda {
namespace {

constexpr char kGemm[] = "cublasGemmStridedBatchedEx";
// Overloaded in C++, one function in the library.
using GemmStridedBatchedEx = cublasStatus_t(cublasHandle_t, cublasOperation_t, cublasOperation_t,
                                            int, int, int, const void*, const void*, cudaDataType,
                                            int, long long, const void*, cudaDataType, int,
                                            long long, const void*, void*, cudaDataType, int,
                                            long long, int, cublasComputeType_t, cublasGemmAlgo_t);

struct Functions {
  decltype(cublasCreate_v2)* create = nullptr;
  decltype(cublasDestroy_v2)* destroy = nullptr;
  decltype(cublasSetStream_v2)* set_stream = nullptr;
  decltype(cublasSetWorkspace_v2)* set_workspace = nullptr;
  decltype(cublasSetMathMode)* set_math_mode = nullptr;
  decltype(cublasSetAtomicsMode)* set_atomics_mode = nullptr;
  decltype(cublasGetStatusString)* status_string = nullptr;
  GemmStridedBatchedEx* gemm = nullptr;
};

absl::StatusOr<Functions> FindFunctions(const CublasFile& file) {
  Functions found;
  KEEPSET_RETURN_IF_ERROR(file.Find("cublasCreate_v2", &found.create));
  KEEPSET_RETURN_IF_ERROR(file.Find("cublasDestroy_v2", &found.destroy));
  KEEPSET_RETURN_IF_ERROR(file.Find("cublasSetStream_v2", &found.set_stream));
  KEEPSET_RETURN_IF_ERROR(file.Find("cublasSetWorkspace_v2", &found.set_workspace));
  KEEPSET_RETURN_IF_ERROR(file.Find("cublasSetMathMode", &found.set_math_mode));
  KEEPSET_RETURN_IF_ERROR(file.Find("cublasSetAtomicsMode", &found.set_atomics_mode));
  KEEPSET_RETURN_IF_ERROR(file.Find("cublasGetStatusString", &found.status_string));
  KEEPSET_RETURN_IF_ERROR(file.Find(kGemm, &found.gemm));
  return found;
}

cudaDataType DataType(DType dtype) {
  if (dtype == DType::kF32) return CUDA_R_32F;
  return dtype == DType::kF16 ? CUDA_R_16F : CUDA_R_16BF;
}

std::string ShapeText(const LogitGemm& gemm) {
  return absl::StrCat(DTypeName(gemm.dtype), " ", gemm.batch, " x [", gemm.num_rows, ", ",
                      gemm.head_dim, "] x [", gemm.num_tokens, ", ", gemm.head_dim, "]");
}

class CublasProducts : public LogitProducts {
 public:
  CublasProducts(std::string name, const Functions& functions, DeviceHealth& health)
      : name_(std::move(name)), functions_(functions), health_(health) {}
  ~CublasProducts() override {
    if (handle_ == nullptr) return;
    // A device that cannot be set again has failed: nothing is lost.
    const absl::StatusOr<CurrentDevice> current = CurrentDevice::Set(device_, health_);
    functions_.destroy(handle_);
  }

  absl::Status Init() {
    KEEPSET_RETURN_IF_CUDA_ERROR(health_, cudaGetDevice(&device_));
    cublasStatus_t status = functions_.create(&handle_);
    if (status != CUBLAS_STATUS_SUCCESS) {
      handle_ = nullptr;
      return Refused("cublasCreate", status);
    }
    // Sums in fp32 throughout, in a fixed order.
    status = functions_.set_math_mode(
        handle_, static_cast<cublasMath_t>(CUBLAS_DEFAULT_MATH |
                                           CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    if (status != CUBLAS_STATUS_SUCCESS) return Refused("cublasSetMathMode", status);
    status = functions_.set_atomics_mode(handle_, CUBLAS_ATOMICS_NOT_ALLOWED);
    if (status != CUBLAS_STATUS_SUCCESS) return Refused("cublasSetAtomicsMode", status);
    return absl::OkStatus();
  }

  absl::Status Queue(const LogitGemm& gemm, std::byte* workspace, cudaStream_t stream) override {
    const float alpha = 1.0f;
    const float beta = 0.0f;
    const cudaDataType type = DataType(gemm.dtype);
    // fp32 stays fp32: neither TF32 nor sums of bf16 products, whatever the environment allows.
    const cublasComputeType_t compute =
        gemm.dtype == DType::kF32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F;
    const absl::MutexLock lock(&mutex_);
    KEEPSET_RETURN_IF_ERROR(
        Check(functions_.set_stream(handle_, stream), "cublasSetStream", gemm, stream));
    // Setting the stream has put the library's own workspace back, which streams share.
    KEEPSET_RETURN_IF_ERROR(
        Check(functions_.set_workspace(handle_, workspace, kCublasWorkspaceBytes),
              "cublasSetWorkspace", gemm, stream));
    // Column-major: rows of keys, queries and logits are its columns.
    const cublasStatus_t status = functions_.gemm(
        handle_, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(gemm.num_tokens),
        static_cast<int>(gemm.num_rows), static_cast<int>(gemm.head_dim), &alpha, gemm.keys, type,
        static_cast<int>(gemm.key_pitch), gemm.key_stride, gemm.queries, type,
        static_cast<int>(gemm.query_pitch), gemm.query_stride, &beta, gemm.logits, CUDA_R_32F,
        static_cast<int>(gemm.logit_pitch), gemm.logit_stride, static_cast<int>(gemm.batch),
        compute, CUBLAS_GEMM_DEFAULT);
    return Check(status, kGemm, gemm, stream);
  }

 private:
  std::string Text(absl::string_view call, cublasStatus_t status) const {
    return absl::StrCat(name_, ": ", call, ": ", functions_.status_string(status), " (",
                        static_cast<int>(status), ")");
  }

  absl::Status Refused(absl::string_view call, cublasStatus_t status) const {
    if (status == CUBLAS_STATUS_ALLOC_FAILED) {
      return absl::ResourceExhaustedError(
          absl::StrCat(Text(call, status),
                       ": the device has no memory for it, want to start before what fills the "
                       "device"));
    }
    return absl::FailedPreconditionError(
        absl::StrCat(Text(call, status), ": want a version that the driver supports"));
  }

  absl::Status Check(cublasStatus_t status, absl::string_view call, const LogitGemm& gemm,
                     cudaStream_t stream) const {
    if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
    KEEPSET_RETURN_IF_ERROR(CheckDevice(call, stream));
    const std::string text = absl::StrCat("cuda: ", Text(call, status), " for ", ShapeText(gemm));
    if (status == CUBLAS_STATUS_ALLOC_FAILED) return absl::ResourceExhaustedError(text);
    const bool is_refused =
        status == CUBLAS_STATUS_INVALID_VALUE || status == CUBLAS_STATUS_NOT_SUPPORTED;
    // What the calls before it refuse is no shape of the caller's.
    if (!is_refused || call != kGemm) return absl::InternalError(text);
    return absl::InvalidArgumentError(
        absl::StrCat(text, ", want window_kernels=\"portable\" for this shape"));
  }

  // The error of the device under a call that failed, which says more. The library has a runtime of
  // its own, whose errors ours learns by asking.
  absl::Status CheckDevice(absl::string_view call, cudaStream_t stream) const {
    const cudaError_t error = cudaStreamQuery(stream);
    if (error == cudaSuccess) return absl::OkStatus();
    cudaGetLastError();  // Said here, or no error.
    return error == cudaErrorNotReady ? absl::OkStatus() : health_.Check(error, call);
  }

  const std::string name_;
  const Functions functions_;
  DeviceHealth& health_;
  absl::Mutex mutex_;
  int device_ = 0;
  cublasHandle_t handle_ = nullptr;  // used by one thread at a time, after Init under mutex_
};

absl::StatusOr<std::unique_ptr<LogitProducts>> ProductsOf(const CublasFile& file,
                                                          DeviceHealth& health) {
  KEEPSET_ASSIGN_OR_RETURN(const Functions functions, FindFunctions(file));
  auto products = std::make_unique<CublasProducts>(file.name(), functions, health);
  KEEPSET_RETURN_IF_ERROR(products->Init());
  return products;
}

}  // namespace

absl::Status CheckCublasIsBuilt() { return absl::OkStatus(); }

absl::StatusOr<std::unique_ptr<LogitProducts>> NewCublasProducts(
    absl::Span<const std::string> files, DeviceHealth& health) {
  std::vector<std::string> reasons;
  while (true) {
    const absl::StatusOr<CublasFile> file = CublasFile::Load(files);
    if (!file.ok()) {
      reasons.emplace_back(file.status().message());
      break;
    }
    absl::StatusOr<std::unique_ptr<LogitProducts>> products = ProductsOf(*file, health);
    // No other version needs less memory.
    if (products.ok() || absl::IsResourceExhausted(products.status())) return products;
    reasons.emplace_back(products.status().message());
    files.remove_prefix(std::find(files.begin(), files.end(), file->name()) - files.begin() + 1);
    if (files.empty()) break;
  }
  return absl::FailedPreconditionError(absl::StrJoin(reasons, "; "));
}

}  // namespace keepset::kernels::cuda

#else

namespace keepset::kernels::cuda {

absl::Status CheckCublasIsBuilt() {
  return absl::InvalidArgumentError(
      "cuda: window_kernels=\"cublas\": not in this build (KEEPSET_CUBLAS=OFF, or a toolkit "
      "without "
      "cublas_v2.h), want a build with it or \"portable\"");
}

absl::StatusOr<std::unique_ptr<LogitProducts>> NewCublasProducts(
    absl::Span<const std::string> /*files*/, DeviceHealth& /*health*/) {
  return CheckCublasIsBuilt();
}

}  // namespace keepset::kernels::cuda

#endif
