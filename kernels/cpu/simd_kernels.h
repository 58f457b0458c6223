// The vectorised inner loops of the CPU backend, each compiled once per SIMD target and chosen at
// run time. Plain pointers and counts; no memory is owned, nothing is allocated. Thread-safe.
#ifndef KEEPSET_KERNELS_CPU_SIMD_KERNELS_H_
#define KEEPSET_KERNELS_CPU_SIMD_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "kernels/compute_backend.h"
#include "kernels/views.h"

namespace keepset::kernels::cpu {

// Tokens of one chunk of K: a multiple of the panel width of every target; a chunk of 128 channels
// (192 KiB) stays in a second-level cache. Part of the result: partial sums are formed per chunk.
constexpr int64_t kChunkTokens = 384;
// Query rows that one block of packed queries holds.
constexpr int64_t kRowBlock = 8;
// Tokens transposed at a time, at most.
constexpr int64_t kMaxLanes = 16;

// "avx512", "avx2", "sse4", ...: the target that this machine uses.
const char* SimdTargetName();

// Floats of the staging memory that PackTokens needs.
constexpr int64_t StagingFloats(int64_t head_dim) { return (head_dim + 3) / 4 * 4 * kMaxLanes; }

// Widens `count` <= kChunkTokens rows of K to fp32 and transposes them into panels
// [ceil(count / P)][head_dim][P], P the target's panel width, padded with zeros. panels:
// [kChunkTokens * head_dim]. False when an element is NaN or infinite.
bool PackTokens(const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
                float* staging, float* panels);

// queries[c][r] = scale * element c of row r, 0 for count <= r < kRowBlock; count <= kRowBlock.
// queries: [head_dim, kRowBlock]. False when an element is NaN or infinite.
bool PackQueries(const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
                 float scale, float* staging, float* queries);

// logits[r][t] = sum_c queries[c][r] * panels[t][c] for r < num_rows <= kRowBlock, t < count.
// queries: [head_dim, kRowBlock]; logits: [kRowBlock, kChunkTokens], written to the next multiple
// of the vector length.
void BlockLogits(const float* queries, int64_t num_rows, const float* panels, int64_t count,
                 int64_t head_dim, float* logits);

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

// out[t] = reduction over rows i of factors[i] * values[i][t], rows in ascending order. values:
// [num_rows, row_stride], readable to the next multiple of the vector length; `factors` may be null
// (all 1). kLast takes the last row. kMean divides
// by num_divisor.
void ReduceRows(const float* values, int64_t row_stride, const float* factors, int64_t num_rows,
                RowReduction reduction, int64_t num_divisor, int64_t count, float* out);

// out[i] = element i, exact.
void Widen(const std::byte* data, int64_t count, DType dtype, float* out);

// norms[i] = 2-norm of row i in fp32. A row whose squares leave the normal range of fp32, or that
// holds a value that is not finite, gets NaN instead: the caller looks closer.
void FastNorms(const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
               float* norms);

// Runs about `iterations` * 1000 multiply-adds per lane in registers; returns the floating-point
// operations done and stores a value that depends on all of them.
double RunFmaChains(int64_t iterations, float* sink);

}  // namespace keepset::kernels::cpu

#endif  // KEEPSET_KERNELS_CPU_SIMD_KERNELS_H_
