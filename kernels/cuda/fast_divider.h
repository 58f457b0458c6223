// Division of positions by a number that is known at launch: a multiplication and a shift instead
// of the some twenty instructions of an integer division.
#ifndef KEEPSET_KERNELS_CUDA_FAST_DIVIDER_H_
#define KEEPSET_KERNELS_CUDA_FAST_DIVIDER_H_

#include <cstdint>

#include "kernels/cuda/host_device.h"

namespace keepset::kernels::cuda {

// Exact for dividends in [0, 2^31) and divisors in [1, 2^31): with l = ceil(log2 divisor) and
// multiplier = ceil(2^(31+l) / divisor), the excess multiplier * divisor - 2^(31+l) is below
// 2^l, so it never reaches the next quotient (Granlund and Montgomery 1994, theorem 4.2).
class FastDivider {
 public:
  FastDivider() : FastDivider(1) {}
  explicit FastDivider(uint32_t divisor) : divisor_(divisor) {
    uint32_t log2 = 0;
    while ((uint64_t{1} << log2) < divisor) ++log2;
    shift_ = 31 + log2;
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + divisor - 1) / divisor);
  }

  KEEPSET_HD uint32_t divisor() const { return divisor_; }
  KEEPSET_HD uint32_t Quotient(uint32_t dividend) const {
    return static_cast<uint32_t>((uint64_t{dividend} * multiplier_) >> shift_);
  }
  KEEPSET_HD uint32_t Remainder(uint32_t dividend, uint32_t quotient) const {
    return dividend - quotient * divisor_;
  }

  bool operator==(const FastDivider&) const = default;

 private:
  uint32_t divisor_;
  uint32_t multiplier_;
  uint32_t shift_;
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_FAST_DIVIDER_H_
