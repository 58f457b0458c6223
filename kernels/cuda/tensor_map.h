// Tensor maps: how TMA sees keys in global memory, and their encoding by the driver, whose entry
// point is resolved at run time.
#ifndef KEEPSET_KERNELS_CUDA_TENSOR_MAP_H_
#define KEEPSET_KERNELS_CUDA_TENSOR_MAP_H_

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/views.h"

namespace keepset::kernels::cuda {

constexpr int kMaxTensorRank = 4;

// A tensor of 16-bit elements and the box of it that one load takes, written with the 128-byte
// swizzle; what lies outside of the tensor is zeros. Dimension 0 is contiguous.
struct TensorMapSpec {
  const std::byte* data = nullptr;
  DType dtype = DType::kBF16;
  int rank = 0;
  uint64_t dims[kMaxTensorRank] = {};          // elements
  uint64_t stride_bytes[kMaxTensorRank] = {};  // of dimensions 1 to rank - 1
  uint32_t box[kMaxTensorRank] = {};           // elements
};

// cuTensorMapEncodeTiled.
using TensorMapEncoder = CUresult (*)(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                      void* data, const cuuint64_t* dims,
                                      const cuuint64_t* stride_bytes, const cuuint32_t* box,
                                      const cuuint32_t* element_strides,
                                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                      CUtensorMapL2promotion promotion,
                                      CUtensorMapFloatOOBfill fill);

// FailedPrecondition, with the reason, where the driver has none.
absl::StatusOr<TensorMapEncoder> FindTensorMapEncoder();

absl::Status EncodeTensorMap(TensorMapEncoder encoder, const TensorMapSpec& spec, CUtensorMap* map);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_TENSOR_MAP_H_
