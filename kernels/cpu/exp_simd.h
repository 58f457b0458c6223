// Exponentials of logits, and what turns those of one chunk into probabilities. Compiled once per
// SIMD target and chosen at run time. Nothing is allocated. Thread-safe.
#ifndef KEEPSET_KERNELS_CPU_EXP_SIMD_H_
#define KEEPSET_KERNELS_CPU_EXP_SIMD_H_

#include <cstdint>

#include "kernels/cpu/chunk_shape.h"

namespace keepset::kernels::cpu {

// For each row r < num_rows <= kRowBlock with visible[r] > 0: exponentials[r][t] =
// 2^(logits[r][t] - maxes[r]) for t < visible[r], 0 for visible[r] <= t < count; maxes[r] over the
// visible logits, sums[r] over the exponentials. Rows with visible[r] == 0 are left alone. logits,
// exponentials: [num_rows, kChunkTokens]. Returns the first row of which a visible logit is not
// finite, or -1.
int64_t ExpBelowMax(const float* logits, int64_t num_rows, const int64_t* visible, int64_t count,
                    float* exponentials, float* maxes, float* sums);

// exponentials[r][t] = 2^(logits[r][t] - references[r]), otherwise as above. Returns the first row
// of which a visible logit is not finite or lies 126 or more above the reference, or -1.
int64_t ExpBelow(const float* logits, int64_t num_rows, const int64_t* visible,
                 const float* references, int64_t count, float* exponentials);

// factors[c][r] = 2^(maxes[c][r] - max_r) / sum_r, where max_r and sum_r are those of row r over
// all chunks; 0 for a chunk of which the row sees nothing (sum 0). All [num_chunks, num_rows],
// num_rows a multiple of kMaxLanes.
void ChunkFactors(const float* maxes, const float* sums, int64_t num_chunks, int64_t num_rows,
                  float* factors);

}  // namespace keepset::kernels::cpu

#endif  // KEEPSET_KERNELS_CPU_EXP_SIMD_H_
