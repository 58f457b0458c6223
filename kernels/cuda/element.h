// Scalar reading of tensor elements on either machine.
#ifndef KEEPSET_KERNELS_CUDA_ELEMENT_H_
#define KEEPSET_KERNELS_CUDA_ELEMENT_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/host_device.h"
#include "kernels/views.h"

namespace keepset::kernels::cuda {

KEEPSET_HD inline float FloatOfBits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

KEEPSET_HD inline uint32_t BitsOfFloat(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

KEEPSET_HD inline bool IsFiniteValue(float value) {
  return (BitsOfFloat(value) & 0x7f800000u) != 0x7f800000u;
}

// Moving the exponent field of a half into that of a float leaves a bias difference of 2^112,
// which one exact multiplication repairs, subnormals included.
KEEPSET_HD inline float HalfBitsToFloat(uint16_t half) {
  const float magnitude = FloatOfBits(static_cast<uint32_t>(half & 0x7fffu) << 13) *
                          5192296858534827628530496329220096.0f;  // 2^112
  uint32_t bits = BitsOfFloat(magnitude);
  if ((half & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  return FloatOfBits(bits | (static_cast<uint32_t>(half & 0x8000u) << 16));
}

KEEPSET_HD inline float BfloatBitsToFloat(uint16_t bits) {
  return FloatOfBits(static_cast<uint32_t>(bits) << 16);
}

// The element at row[index], widened without rounding. row: aligned to the element.
KEEPSET_HD inline float LoadElement(const std::byte* row, int64_t index, DType dtype) {
  if (dtype == DType::kF32) return reinterpret_cast<const float*>(row)[index];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[index];
  return dtype == DType::kF16 ? HalfBitsToFloat(bits) : BfloatBitsToFloat(bits);
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_ELEMENT_H_
