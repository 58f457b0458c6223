// Where the rows of K, V or a destination lie: a validated view as kernels take it.
#ifndef KEEPSET_KERNELS_CUDA_DEVICE_ROWS_H_
#define KEEPSET_KERNELS_CUDA_DEVICE_ROWS_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/fast_divider.h"
#include "kernels/cuda/host_device.h"
#include "kernels/views.h"

namespace keepset::kernels::cuda {

// Logical shape [num_heads, num_tokens, head_dim]; strides in bytes. `Byte` is std::byte or const
// std::byte. Plain data, passed to kernels by value.
template <typename Byte>
struct BasicDeviceRows {
  Byte* data = nullptr;
  int64_t head_bytes = 0;
  int64_t token_bytes = 0;
  int64_t block_bytes = 0;
  const int32_t* block_table = nullptr;  // device memory; null when contiguous
  FastDivider block_size;
  int32_t num_heads = 0;
  int32_t num_tokens = 0;
  int32_t head_dim = 0;
  DType dtype = DType::kF32;

  // Bytes from `data` to the row of `token` of head 0.
  KEEPSET_HD int64_t TokenOffset(int32_t token) const {
    if (block_table == nullptr) return token * token_bytes;
    const uint32_t block = block_size.Quotient(static_cast<uint32_t>(token));
    const uint32_t place = block_size.Remainder(static_cast<uint32_t>(token), block);
    return block_table[block] * block_bytes + place * token_bytes;
  }
  KEEPSET_HD Byte* Row(int32_t head, int32_t token) const {
    return data + head * head_bytes + TokenOffset(token);
  }

  bool operator==(const BasicDeviceRows&) const = default;
};

using DeviceRows = BasicDeviceRows<const std::byte>;
using MutableDeviceRows = BasicDeviceRows<std::byte>;

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_DEVICE_ROWS_H_
