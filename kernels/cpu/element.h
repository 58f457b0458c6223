// Scalar reading of tensor elements; the exact twin of the vector loads in simd_vectors_inl.h.
#ifndef KEEPSET_KERNELS_CPU_ELEMENT_H_
#define KEEPSET_KERNELS_CPU_ELEMENT_H_

#include <cstddef>
#include <cstdint>

#include "kernels/views.h"

namespace keepset::kernels::cpu {

// The element at data[index], widened without rounding.
float LoadElement(const std::byte* data, int64_t index, DType dtype);

bool IsFinite(float value);

// Index of the first of `count` elements that is NaN or infinite, or -1.
int64_t FindNonFinite(const std::byte* data, int64_t count, DType dtype);

}  // namespace keepset::kernels::cpu

#endif  // KEEPSET_KERNELS_CPU_ELEMENT_H_
