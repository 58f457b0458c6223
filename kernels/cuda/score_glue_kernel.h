// Bodies of the kernels of score_glue.h.
#ifndef KEEPSET_KERNELS_CUDA_SCORE_GLUE_KERNEL_H_
#define KEEPSET_KERNELS_CUDA_SCORE_GLUE_KERNEL_H_

#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/score_glue.h"
#include "kernels/row_sums.h"

namespace keepset::kernels::cuda {

// std::max of the CPU backend, which keeps the first of two zeros.
template <typename Value>
KEEPSET_HD inline Value LargerOf(Value a, Value b) {
  return a < b ? b : a;
}

template <typename Simt>
KEEPSET_KERNEL_BODY inline float MergedValue(const Simt& simt, const GlueParams& p, int64_t row,
                                             int64_t t) {
  const int64_t group = p.in_rows / p.rows;
  float merged = 0.0f;
  for (int64_t j = 0; j < group; ++j) {
    const int64_t source = row * group + j;
    const float weight = p.weights == nullptr ? 1.0f : p.weights[source];
    const float x = simt.Mul(p.in[source * p.cols + t], weight);
    if (j == 0) {
      merged = x;
    } else {
      merged = p.merge == Merge::kMax ? LargerOf(merged, x) : simt.Add(merged, x);
    }
  }
  return p.merge == Merge::kMean ? simt.Div(merged, static_cast<float>(group)) : merged;
}

// Joins the parts of a row in ascending order.
template <typename Simt>
KEEPSET_KERNEL_BODY inline double JoinParts(const Simt& simt, const double* parts, int64_t blocks) {
  double sum = 0.0;
  for (int64_t block = 0; block < blocks; ++block) sum = simt.Add(sum, parts[block]);
  return sum;
}

// value -> (value - shift) * factor; both 0 when the row has no scale.
struct RowScale {
  float shift;
  float factor;
};

template <typename Simt>
KEEPSET_KERNEL_BODY inline RowScale ScaleOfRow(const Simt& simt, const GlueParams& p, int64_t row) {
  const int64_t blocks = NumSumBlocks(p.cols);
  const double* parts = p.parts + row * blocks;
  if (p.normalization == Normalization::kMax) {
    double largest = 0.0;
    for (int64_t block = 0; block < blocks; ++block) largest = LargerOf(largest, parts[block]);
    return {0.0f, InverseOrZero(largest)};
  }
  const double sum = JoinParts(simt, parts, blocks);
  if (p.normalization == Normalization::kSum) return {0.0f, InverseOrZero(sum)};
  if (p.count == 0) return {0.0f, 0.0f};
  const auto count = static_cast<double>(p.count);
  const double squares = JoinParts(simt, p.square_parts + row * blocks, blocks);
  const float factor = InverseOrZero(simt.Sqrt(simt.Div(squares, count)));
  return {factor == 0.0f ? 0.0f : static_cast<float>(simt.Div(sum, count)), factor};
}

template <typename Simt>
KEEPSET_KERNEL_BODY void GlueKernel::Run(const Simt& simt, const Params& p) {
  const int64_t step = static_cast<int64_t>(simt.grid_x()) * simt.num_threads();
  const int64_t first =
      p.begin + static_cast<int64_t>(simt.block_x()) * simt.num_threads() + simt.thread();
  for (int64_t row = simt.block_y(); row < p.rows; row += simt.grid_y()) {
    float divisor = 1.0f;
    if (p.op == GlueOp::kDivideByMean) {
      const int64_t blocks = NumSumBlocks(p.cols);
      const double sum = JoinParts(simt, p.parts + row * blocks, blocks);
      divisor = LargerOf(p.factor, static_cast<float>(simt.Div(sum, static_cast<double>(p.cols))));
    }
    RowScale scale = {0.0f, 0.0f};
    if (p.op == GlueOp::kNormalize) scale = ScaleOfRow(simt, p, row);
    for (int64_t t = first; t < p.end; t += step) {
      float* out = p.out + row * p.cols + t;
      switch (p.op) {
        case GlueOp::kMergeRows:
          *out = MergedValue(simt, p, row, t);
          break;
        case GlueOp::kAccumulate: {
          const float x = simt.Mul(p.factor, p.in[row * p.cols + t]);
          *out = p.merge == Merge::kMax ? LargerOf(*out, x) : simt.Add(*out, x);
          break;
        }
        case GlueOp::kMultiply: {
          const float y = p.in[(p.in_rows == 1 ? 0 : row) * p.cols + t];
          *out = simt.Mul(*out, simt.Mul(y, p.factor));
          break;
        }
        case GlueOp::kFill:
          *out = p.factor;
          break;
        case GlueOp::kDivideByMean:
          *out = simt.Div(*out, divisor);
          break;
        case GlueOp::kNormalize:
          *out = simt.Mul(simt.Add(*out, -scale.shift), scale.factor);
          break;
      }
    }
  }
}

template <typename Simt>
KEEPSET_KERNEL_BODY inline double SummedValue(const Simt& simt, const SumParams& p, float score,
                                              int64_t t, double total, double mean) {
  if (p.excluded != nullptr && ((p.excluded[t / 32] >> (t % 32)) & 1u) != 0) return 0.0;
  const double value = score;
  if (p.kind == SumKind::kEntropy) {
    const double share = simt.Div(value, total);
    return simt.Mul(share, -simt.Log(LargerOf(share, kSmallestProbability)));
  }
  if (p.kind != SumKind::kSquares) return value;
  const double distance = simt.Add(value, -mean);
  return simt.Mul(distance, distance);
}

template <typename Simt>
KEEPSET_KERNEL_BODY void SumKernel::Run(const Simt& simt, const Params& p) {
  static_assert(kMaxThreads == kSumLanes);
  auto* lanes = reinterpret_cast<double*>(simt.shared());  // [kSumLanes]
  const int64_t blocks = NumSumBlocks(p.cols);
  const int64_t begin = simt.block_x() * kSumBlockColumns;
  const int64_t end = begin + kSumBlockColumns < p.cols ? begin + kSumBlockColumns : p.cols;
  for (int64_t row = simt.block_y(); row < p.rows; row += simt.grid_y()) {
    const float* values = p.in + row * p.cols;
    double total = 0.0;
    if (p.totals != nullptr) total = JoinParts(simt, p.totals + row * blocks, blocks);
    const double mean =
        p.kind == SumKind::kSquares ? simt.Div(total, static_cast<double>(p.count)) : 0.0;
    double sum = 0.0;
    for (int64_t t = begin + simt.thread(); t < end; t += kSumLanes) {
      const double value = SummedValue(simt, p, values[t], t, total, mean);
      sum = p.kind == SumKind::kLargest ? LargerOf(sum, value) : simt.Add(sum, value);
    }
    lanes[simt.thread()] = sum;
    simt.SyncBlock();
    for (int half = kSumLanes / 2; half > 0; half /= 2) {
      if (simt.thread() < half) {
        const double mine = lanes[simt.thread()];
        const double other = lanes[simt.thread() + half];
        lanes[simt.thread()] =
            p.kind == SumKind::kLargest ? LargerOf(mine, other) : simt.Add(mine, other);
      }
      simt.SyncBlock();
    }
    if (simt.thread() == 0) p.parts[row * blocks + simt.block_x()] = lanes[0];
    simt.SyncBlock();
  }
}

template <typename Simt>
KEEPSET_KERNEL_BODY inline float SlidValue(const Simt& simt, const SlideParams& p, const float* in,
                                           int64_t row, int64_t t) {
  const int64_t begin = t > p.before ? t - p.before : 0;
  const int64_t end = p.length - t > p.after ? t + p.after + 1 : p.length;
  switch (p.op) {
    case SlideOp::kAverage: {
      float sum = 0.0f;
      for (int64_t i = begin; i < end; ++i) sum = simt.Add(sum, in[i]);
      return simt.Div(sum, static_cast<float>(p.divisor));
    }
    case SlideOp::kMax: {
      float max = in[begin];
      for (int64_t i = begin + 1; i < end; ++i) max = LargerOf(max, in[i]);
      return max;
    }
    case SlideOp::kPad:
      return t < p.before ? FloatOfBits(0xff800000u) : in[t - p.before];
    case SlideOp::kPairMax:
      return LargerOf(in[t], in[t + p.after < p.in_length ? t + p.after : p.in_length - 1]);
    case SlideOp::kPrefix: {
      const double* prefix = p.prefix + row * (p.length + 1);
      const double sum = simt.Add(prefix[end], -prefix[begin]);
      return static_cast<float>(simt.Div(sum, static_cast<double>(p.divisor)));
    }
  }
  return 0.0f;
}

template <typename Simt>
KEEPSET_KERNEL_BODY void SlideKernel::Run(const Simt& simt, const Params& p) {
  const int64_t step = static_cast<int64_t>(simt.grid_x()) * simt.num_threads();
  const int64_t first = static_cast<int64_t>(simt.block_x()) * simt.num_threads() + simt.thread();
  for (int64_t row = simt.block_y(); row < p.rows; row += simt.grid_y()) {
    const float* in = p.in + row * p.in_stride;
    float* out = p.out + row * p.out_stride;
    for (int64_t t = first; t < p.length; t += step) out[t] = SlidValue(simt, p, in, row, t);
  }
}

template <typename Simt>
KEEPSET_KERNEL_BODY void PrefixKernel::Run(const Simt& simt, const Params& p) {
  auto* sums = reinterpret_cast<double*>(simt.shared());  // two of [kMaxThreads]
  const float* in = p.in + simt.block_x() * p.stride;
  double* prefix = p.prefix + simt.block_x() * (p.length + 1);
  double carry = 0.0;
  if (simt.thread() == 0) prefix[0] = 0.0;
  for (int64_t base = 0; base < p.length; base += simt.num_threads()) {
    const int64_t t = base + simt.thread();
    double sum = t < p.length ? static_cast<double>(in[t]) : 0.0;
    // Inclusive scan by doubling, from one buffer into the other.
    int from = 0;
    sums[simt.thread()] = sum;
    simt.SyncBlock();
    for (int distance = 1; distance < simt.num_threads(); distance *= 2) {
      if (simt.thread() >= distance) {
        sum = simt.Add(sums[from * kMaxThreads + simt.thread() - distance], sum);
      }
      from ^= 1;
      sums[from * kMaxThreads + simt.thread()] = sum;
      simt.SyncBlock();
    }
    if (t < p.length) prefix[t + 1] = simt.Add(carry, sum);
    carry = simt.Add(carry, sums[from * kMaxThreads + simt.num_threads() - 1]);
    simt.SyncBlock();
  }
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_SCORE_GLUE_KERNEL_H_
