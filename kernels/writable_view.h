#ifndef KEEPSET_KERNELS_WRITABLE_VIEW_H_
#define KEEPSET_KERNELS_WRITABLE_VIEW_H_

#include <cstddef>

#include "kernels/views.h"

namespace keepset::kernels {

// The layout of `view` over memory at `data`, of which as many bytes belong to it. Borrows the
// block table.
inline MutableKvView WritableLike(const KvView& view, std::byte* data) {
  MutableKvView to;
  to.data = data;
  to.size_bytes = view.size_bytes;
  to.dtype = view.dtype;
  to.num_kv_heads = view.num_kv_heads;
  to.seq_len = view.seq_len;
  to.head_dim = view.head_dim;
  to.head_stride = view.head_stride;
  to.token_stride = view.token_stride;
  to.block_size = view.block_size;
  to.block_stride = view.block_stride;
  to.block_table = view.block_table;
  return to;
}

}  // namespace keepset::kernels

#endif  // KEEPSET_KERNELS_WRITABLE_VIEW_H_
