// Element types as the vendor's libraries name them, for machines without a toolkit (cuda.h beside
// it).
#ifndef KEEPSET_TESTS_KERNELS_CUDA_INTERFACE_LIBRARY_TYPES_H_
#define KEEPSET_TESTS_KERNELS_CUDA_INTERFACE_LIBRARY_TYPES_H_

enum cudaDataType { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };

#endif  // KEEPSET_TESTS_KERNELS_CUDA_INTERFACE_LIBRARY_TYPES_H_
