// Sums and maxima over rows. Compiled once per SIMD target and chosen at run time. Nothing is
// allocated. Thread-safe.
#ifndef KEEPSET_KERNELS_CPU_REDUCE_ROWS_SIMD_H_
#define KEEPSET_KERNELS_CPU_REDUCE_ROWS_SIMD_H_

#include <cstdint>

#include "kernels/compute_backend.h"

namespace keepset::kernels::cpu {

// out[t] = reduction over rows i of factors[i] * values[i][t], rows in ascending order. values:
// [num_rows, row_stride], readable to the next multiple of the vector length; `factors` may be null
// (all 1). kLast takes the last row. kMean divides by num_divisor.
void ReduceRows(const float* values, int64_t row_stride, const float* factors, int64_t num_rows,
                RowReduction reduction, int64_t num_divisor, int64_t count, float* out);

}  // namespace keepset::kernels::cpu

#endif  // KEEPSET_KERNELS_CPU_REDUCE_ROWS_SIMD_H_
