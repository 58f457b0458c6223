// Rows of a tensor to the fp32 layouts that the other loops read. Compiled once per SIMD target and
// chosen at run time. Nothing is allocated. Thread-safe.
#ifndef KEEPSET_KERNELS_CPU_PACK_SIMD_H_
#define KEEPSET_KERNELS_CPU_PACK_SIMD_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/chunk_shape.h"
#include "kernels/views.h"

namespace keepset::kernels::cpu {

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

// out[i] = element i, exact.
void Widen(const std::byte* data, int64_t count, DType dtype, float* out);

}  // namespace keepset::kernels::cpu

#endif  // KEEPSET_KERNELS_CPU_PACK_SIMD_H_
