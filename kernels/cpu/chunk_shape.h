// Sizes that the packed operands of the window scores share.
#ifndef KEEPSET_KERNELS_CPU_CHUNK_SHAPE_H_
#define KEEPSET_KERNELS_CPU_CHUNK_SHAPE_H_

#include <cstdint>

namespace keepset::kernels::cpu {

// Tokens of one chunk of K: a multiple of the panel width of every target; a chunk of 128 channels
// (192 KiB) stays in a second-level cache. Part of the result: partial sums are formed per chunk.
constexpr int64_t kChunkTokens = 384;
// Query rows that one block of packed queries holds.
constexpr int64_t kRowBlock = 8;
// Tokens transposed at a time, at most.
constexpr int64_t kMaxLanes = 16;

}  // namespace keepset::kernels::cpu

#endif  // KEEPSET_KERNELS_CPU_CHUNK_SHAPE_H_
