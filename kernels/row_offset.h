// Address of a row of K or V, contiguous or paged.
#ifndef KEEPSET_KERNELS_ROW_OFFSET_H_
#define KEEPSET_KERNELS_ROW_OFFSET_H_

#include <cstdint>

#include "kernels/views.h"

namespace keepset::kernels {

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

}  // namespace keepset::kernels

#endif  // KEEPSET_KERNELS_ROW_OFFSET_H_
