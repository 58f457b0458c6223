#include "kernels/cpu/element.h"

#include <bit>
#include <cstring>

namespace keepset::kernels::cpu {
namespace {

// Moving the exponent field of a half into that of a float leaves a bias difference of 2^112,
// which one exact multiplication repairs, subnormals included.
float HalfToFloat(uint16_t half) {
  const float magnitude = std::bit_cast<float>(uint32_t{half & 0x7fffu} << 13) * 0x1p112f;
  uint32_t bits = std::bit_cast<uint32_t>(magnitude);
  if ((half & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  return std::bit_cast<float>(bits | (uint32_t{half & 0x8000u} << 16));
}

}  // namespace

float LoadElement(const std::byte* data, int64_t index, DType dtype) {
  if (dtype == DType::kF32) {
    float value;
    std::memcpy(&value, data + index * 4, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, data + index * 2, sizeof(bits));
  if (dtype == DType::kF16) return HalfToFloat(bits);
  return std::bit_cast<float>(uint32_t{bits} << 16);
}

bool IsFinite(float value) { return (std::bit_cast<uint32_t>(value) & 0x7f800000u) != 0x7f800000u; }

int64_t FindNonFinite(const std::byte* data, int64_t count, DType dtype) {
  for (int64_t i = 0; i < count; ++i) {
    if (!IsFinite(LoadElement(data, i, dtype))) return i;
  }
  return -1;
}

}  // namespace keepset::kernels::cpu
