// The order in which every backend sums the scores of a row, so that means and masses have equal
// bits on all of them: blocks of kSumBlockColumns columns; in a block kSumLanes partial sums over
// every kSumLanes-th column, joined pairwise; the sums of the blocks in ascending order. All in
// fp64.
#ifndef KEEPSET_KERNELS_ROW_SUMS_H_
#define KEEPSET_KERNELS_ROW_SUMS_H_

#include <cstdint>

namespace keepset::kernels {

constexpr int64_t kSumBlockColumns = 8192;
constexpr int64_t kSumLanes = 256;

constexpr int64_t NumSumBlocks(int64_t cols) {
  return (cols + kSumBlockColumns - 1) / kSumBlockColumns;
}

// The probabilities of an entropy are not taken to be smaller.
constexpr double kSmallestProbability = 1e-8;

// Sum of value(t) over t in [begin, end), at most one block.
template <typename Value>
double SumBlock(int64_t begin, int64_t end, Value value) {
  double lanes[kSumLanes] = {};
  int64_t t = begin;
  for (; t + kSumLanes <= end; t += kSumLanes) {
    for (int64_t lane = 0; lane < kSumLanes; ++lane) lanes[lane] += value(t + lane);
  }
  for (int64_t lane = 0; t + lane < end; ++lane) lanes[lane] += value(t + lane);
  for (int64_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

}  // namespace keepset::kernels

#endif  // KEEPSET_KERNELS_ROW_SUMS_H_
