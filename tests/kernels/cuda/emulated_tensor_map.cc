#include "tests/kernels/cuda/emulated_tensor_map.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tests/kernels/cuda/hopper_emulator.h"

namespace keepset::kernels::cuda {

CUresult EncodeEmulatedTensorMap(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                 void* data, const cuuint64_t* dims, const cuuint64_t* stride_bytes,
                                 const cuuint32_t* box, const cuuint32_t* element_strides,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion /*promotion*/,
                                 CUtensorMapFloatOOBfill fill) {
  constexpr cuuint64_t kDimLimit = cuuint64_t{1} << 32;
  constexpr cuuint64_t kStrideLimit = cuuint64_t{1} << 40;
  EmulatedTensorMap made;
  bool is_good =
      reinterpret_cast<uintptr_t>(map) % 64 == 0 && rank >= 3 && rank <= 4 &&
      (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16) &&
      reinterpret_cast<uintptr_t>(data) % 16 == 0 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
      fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_32B:
      made.swizzle_bytes = 32;
      break;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      made.swizzle_bytes = 64;
      break;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      made.swizzle_bytes = 128;
      break;
    default:
      is_good = false;
  }
  if (!is_good) return CUDA_ERROR_INVALID_VALUE;
  made.rank = static_cast<uint16_t>(rank);
  made.data = static_cast<const std::byte*>(data);
  cuuint64_t before = 2;
  for (cuuint32_t i = 0; i < rank; ++i) {
    made.dims[i] = dims[i];
    made.stride_bytes[i] = i == 0 ? 2 : stride_bytes[i - 1];
    made.box[i] = static_cast<uint16_t>(box[i]);
    is_good = is_good && dims[i] >= 1 && dims[i] <= kDimLimit && box[i] >= 1 && box[i] <= 256 &&
              element_strides[i] == 1 && made.stride_bytes[i] % before == 0 &&
              made.stride_bytes[i] < kStrideLimit && (i == 0 || made.stride_bytes[i] % 16 == 0);
    before = made.stride_bytes[i];
  }
  is_good = is_good && box[0] * 2 <= made.swizzle_bytes && box[0] * 2 % 16 == 0 &&
            made.stride_bytes[1] >= 2 * dims[0];
  if (!is_good) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

}  // namespace keepset::kernels::cuda
