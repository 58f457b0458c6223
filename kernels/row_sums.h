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

// Sum of value(t) over t in [0, cols).
template <typename Value>
double SumBlocks(int64_t cols, Value value) {
  double sum = 0.0;
  for (int64_t begin = 0; begin < cols; begin += kSumBlockColumns) {
    const int64_t end = begin + kSumBlockColumns < cols ? begin + kSumBlockColumns : cols;
    sum += SumBlock(begin, end, value);
  }
  return sum;
}

// What a row is multiplied by to divide it; 0 where there is nothing to divide by, or so little
// that the factor would not be finite.
constexpr float InverseOrZero(double divisor) {
  if (!(divisor > 0.0)) return 0.0f;
  const double inverse = 1.0 / divisor;
  return inverse <= 3.4028234663852886e38 ? static_cast<float>(inverse) : 0.0f;
}

}  // namespace keepset::kernels

#endif  // KEEPSET_KERNELS_ROW_SUMS_H_
