// The order in which every backend adds what key novelty consists of, so that it has equal bits on
// all of them: a product of two rows in kNoveltyLanes partial sums over every kNoveltyLanes-th
// channel, joined in ascending order; directions per chunk of kNoveltyChunk positions in fp32, the
// chunks in fp64.
#ifndef KEEPSET_KERNELS_NOVELTY_ORDER_H_
#define KEEPSET_KERNELS_NOVELTY_ORDER_H_

#include <cstdint>

namespace keepset::kernels {

constexpr int64_t kNoveltyChunk = 512;
constexpr int64_t kNoveltyLanes = 16;

}  // namespace keepset::kernels

#endif  // KEEPSET_KERNELS_NOVELTY_ORDER_H_
