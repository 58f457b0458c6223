// 2-norms of rows. Compiled once per SIMD target and chosen at run time. Nothing is
// allocated. Thread-safe.
#ifndef KEEPSET_KERNELS_CPU_NORMS_SIMD_H_
#define KEEPSET_KERNELS_CPU_NORMS_SIMD_H_

#include <cstddef>
#include <cstdint>

#include "kernels/views.h"

namespace keepset::kernels::cpu {

// norms[i] = 2-norm of row i in fp32. A row whose squares leave the normal range of fp32, or that
// holds a value that is not finite, gets NaN instead: the caller looks closer.
void FastNorms(const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
               float* norms);

}  // namespace keepset::kernels::cpu

#endif  // KEEPSET_KERNELS_CPU_NORMS_SIMD_H_
