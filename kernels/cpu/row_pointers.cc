#include "kernels/cpu/row_pointers.h"

#include <algorithm>

namespace keepset::kernels::cpu {

void RowPointers(const KvView& view, int64_t head, int64_t begin, int64_t count,
                 const std::byte** rows) {
  const int64_t stride_bytes = view.token_stride * DTypeBytes(view.dtype);
  int64_t i = 0;
  while (i < count) {
    const int64_t token = begin + i;
    const int64_t run = view.block_size > 0
                            ? std::min(count - i, view.block_size - token % view.block_size)
                            : count - i;
    const std::byte* row = view.data + RowOffsetBytes(view, head, token);
    for (int64_t j = 0; j < run; ++j) rows[i + j] = row + j * stride_bytes;
    i += run;
  }
}

}  // namespace keepset::kernels::cpu
