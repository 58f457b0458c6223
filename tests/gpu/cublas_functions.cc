#include "tests/gpu/cublas_functions.h"

#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/cuda/cublas_file.h"

namespace keepset::gpu {

CublasFunctions::~CublasFunctions() {
  // A benchmark goes on with the figures it has.
  if (handle != nullptr) static_cast<void>(destroy(handle));
}

std::string OpenCublas(CublasFunctions* functions) {
  const auto file = kernels::cuda::CublasFile::Load(kernels::cuda::CublasFile::Names(""));
  if (!file.ok()) return std::string(file.status().message());
  decltype(cublasCreate_v2)* create = nullptr;
  absl::Status status = file->Find("cublasCreate_v2", &create);
  status.Update(file->Find("cublasDestroy_v2", &functions->destroy));
  status.Update(file->Find("cublasGemmEx", &functions->gemm));
  status.Update(file->Find("cublasGemmStridedBatchedEx", &functions->batched_gemm));
  if (!status.ok()) return std::string(status.message());
  const cublasStatus_t created = create(&functions->handle);
  if (created == CUBLAS_STATUS_SUCCESS) return {};
  return absl::StrCat(file->name(), " refuses this device: status ", static_cast<int>(created));
}

}  // namespace keepset::gpu
