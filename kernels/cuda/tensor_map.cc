#include "kernels/cuda/tensor_map.h"

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/strings/str_cat.h"

namespace keepset::kernels::cuda {

absl::StatusOr<TensorMapEncoder> FindTensorMapEncoder() {
  constexpr unsigned kSince = 12000;  // the version of the interface
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             kSince, cudaEnableDefault, &found);
  if (error == cudaSuccess && found == cudaDriverEntryPointSuccess && function != nullptr) {
    return reinterpret_cast<TensorMapEncoder>(function);
  }
  return absl::FailedPreconditionError(
      absl::StrCat("the driver has no cuTensorMapEncodeTiled (",
                   error == cudaSuccess ? "an older driver" : cudaGetErrorString(error),
                   "), want one of CUDA 12.0 or later"));
}

absl::Status EncodeTensorMap(TensorMapEncoder encoder, const TensorMapSpec& spec,
                             CUtensorMap* map) {
  const CUtensorMapDataType type = spec.dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint32_t element_strides[kMaxTensorRank] = {1, 1, 1, 1};
  cuuint64_t dims[kMaxTensorRank];
  cuuint64_t stride_bytes[kMaxTensorRank - 1];
  for (int i = 0; i < spec.rank; ++i) dims[i] = spec.dims[i];
  for (int i = 1; i < spec.rank; ++i) stride_bytes[i - 1] = spec.stride_bytes[i];
  // TMA only reads; the interface has one type for both ways.
  void* const data = const_cast<std::byte*>(spec.data);
  const CUresult result =
      encoder(map, type, static_cast<cuuint32_t>(spec.rank), data, dims, stride_bytes, spec.box,
              element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(
      "cuTensorMapEncodeTiled: error ", static_cast<int>(result), " for a tensor of rank ",
      spec.rank, ", dims ", dims[0], " x ", dims[1], " x ", dims[2]));
}

}  // namespace keepset::kernels::cuda
