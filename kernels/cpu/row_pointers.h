// Addresses of K and V rows, contiguous or paged.
#ifndef KEEPSET_KERNELS_CPU_ROW_POINTERS_H_
#define KEEPSET_KERNELS_CPU_ROW_POINTERS_H_

#include <cstddef>
#include <cstdint>

#include "kernels/row_offset.h"
#include "kernels/views.h"

namespace keepset::kernels::cpu {

// rows[i] = address of (head, begin + i) for i in [0, count).
void RowPointers(const KvView& view, int64_t head, int64_t begin, int64_t count,
                 const std::byte** rows);

}  // namespace keepset::kernels::cpu

#endif  // KEEPSET_KERNELS_CPU_ROW_POINTERS_H_
