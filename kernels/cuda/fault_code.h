// What a kernel reports when it meets a value that it must refuse: the smallest code of an op wins
// (an integer minimum, so that the answer does not depend on the order of threads).
#ifndef KEEPSET_KERNELS_CUDA_FAULT_CODE_H_
#define KEEPSET_KERNELS_CUDA_FAULT_CODE_H_

#include <cstdint>

#include "kernels/cuda/host_device.h"

namespace keepset::kernels::cuda {

// In the order in which they are reported.
enum class FaultKind : uint32_t {
  kQuery = 0,         // place: head * num_rows + row
  kLse = 1,           // place: head * num_rows + row
  kKey = 2,           // place: kv_head * seq_len + position
  kLogit = 3,         // place: (head * num_rows + row) * seq_len + position
  kLseTooLow = 4,     // place: head * num_rows + row
  kRowSum = 5,        // place: head * num_rows + row
  kNormInput = 6,     // place: kv_head * seq_len + position
  kNormTooLarge = 7,  // place: kv_head * seq_len + position
  kTileValue = 8,     // place: (head * num_rows + row) * seq_len + position
  kTileSum = 9,       // place: head
};

constexpr uint64_t kNoFault = ~uint64_t{0};
constexpr int kFaultPlaceBits = 59;

KEEPSET_HD constexpr uint64_t FaultCode(FaultKind kind, int64_t place) {
  return (static_cast<uint64_t>(kind) << kFaultPlaceBits) | static_cast<uint64_t>(place);
}
constexpr FaultKind KindOfFault(uint64_t code) {
  return static_cast<FaultKind>(code >> kFaultPlaceBits);
}
constexpr int64_t PlaceOfFault(uint64_t code) {
  return static_cast<int64_t>(code & ((uint64_t{1} << kFaultPlaceBits) - 1));
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_FAULT_CODE_H_
