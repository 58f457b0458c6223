// Addresses of K and V rows, contiguous or paged.
#ifndef KEEPSET_KERNELS_CPU_ROW_POINTERS_H_
#define KEEPSET_KERNELS_CPU_ROW_POINTERS_H_

#include <cstddef>
#include <cstdint>

#include "kernels/views.h"

namespace keepset::kernels::cpu {

// Byte offset of row (head, token) of a validated view.
template <typename View>
int64_t RowOffsetBytes(const View& view, int64_t head, int64_t token) {
  int64_t elements = head * view.head_stride;
  if (view.block_size > 0) {
    elements += view.block_table[token / view.block_size] * view.block_stride +
                (token % view.block_size) * view.token_stride;
  } else {
    elements += token * view.token_stride;
  }
  return elements * DTypeBytes(view.dtype);
}

// rows[i] = address of (head, begin + i) for i in [0, count).
void RowPointers(const KvView& view, int64_t head, int64_t begin, int64_t count,
                 const std::byte** rows);

}  // namespace keepset::kernels::cpu

#endif  // KEEPSET_KERNELS_CPU_ROW_POINTERS_H_
