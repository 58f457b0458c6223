// What the emulated driver makes of the description of a tensor that TMA is to read.
#ifndef KEEPSET_TESTS_KERNELS_CUDA_EMULATED_TENSOR_MAP_H_
#define KEEPSET_TESTS_KERNELS_CUDA_EMULATED_TENSOR_MAP_H_

#include <cuda.h>

namespace keepset::kernels::cuda {

// An EmulatedTensorMap, of 16-bit elements; it is checked as the driver's manual wants it.
CUresult EncodeEmulatedTensorMap(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                 void* data, const cuuint64_t* dims, const cuuint64_t* stride_bytes,
                                 const cuuint32_t* box, const cuuint32_t* element_strides,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_TESTS_KERNELS_CUDA_EMULATED_TENSOR_MAP_H_
