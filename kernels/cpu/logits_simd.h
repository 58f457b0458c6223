// The products of packed queries and packed tokens. Compiled once per SIMD target and chosen at run
// time. Nothing is allocated. Thread-safe.
#ifndef KEEPSET_KERNELS_CPU_LOGITS_SIMD_H_
#define KEEPSET_KERNELS_CPU_LOGITS_SIMD_H_

#include <cstdint>

#include "kernels/cpu/chunk_shape.h"

namespace keepset::kernels::cpu {

// logits[r][t] = sum_c queries[c][r] * panels[t][c] for r < num_rows <= kRowBlock, t < count.
// queries: [head_dim, kRowBlock]; logits: [kRowBlock, kChunkTokens], written to the next multiple
// of the vector length.
void BlockLogits(const float* queries, int64_t num_rows, const float* panels, int64_t count,
                 int64_t head_dim, float* logits);

}  // namespace keepset::kernels::cpu

#endif  // KEEPSET_KERNELS_CPU_LOGITS_SIMD_H_
