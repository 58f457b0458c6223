#include <algorithm>
#include <cstdint>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cpu/ops.h"
#include "kernels/op_checks.h"

namespace keepset::kernels::cpu {
namespace {

// Above this width prefix sums in fp64 are cheaper than adding each window.
constexpr int64_t kDirectKernel = 32;

// row[t] = max of row[max(0, t - before) .. min(length - 1, t + after)]: each block of `width`
// values is scanned from both ends, and a window of `width` values is the end of one scan and the
// beginning of another. scratch: [2 * (length + before + after + width)].
void SlidingMax(float* row, int64_t length, int64_t before, int64_t after, float* scratch) {
  const int64_t width = before + after + 1;
  const int64_t padded = length + before + after;
  float* forward = scratch;
  float* backward = scratch + padded + width;
  const auto value = [&](int64_t i) {
    const int64_t t = i - before;
    return t >= 0 && t < length ? row[t] : -std::numeric_limits<float>::infinity();
  };
  for (int64_t begin = 0; begin < padded; begin += width) {
    const int64_t end = std::min(begin + width, padded);
    forward[begin] = value(begin);
    for (int64_t i = begin + 1; i < end; ++i) forward[i] = std::max(forward[i - 1], value(i));
    backward[end - 1] = value(end - 1);
    for (int64_t i = end - 2; i >= begin; --i) backward[i] = std::max(backward[i + 1], value(i));
  }
  for (int64_t t = 0; t < length; ++t) row[t] = std::max(backward[t], forward[t + width - 1]);
}

int64_t SlidingScratchFloats(int64_t length, int64_t before, int64_t after) {
  return 2 * (length + 2 * (before + after) + 1);
}

void AveragePool(float* row, int64_t length, int64_t kernel, double* scratch) {
  const int64_t half = kernel / 2;
  const float divisor = static_cast<float>(kernel);
  if (kernel <= kDirectKernel) {
    float* copy = reinterpret_cast<float*>(scratch);
    std::copy(row, row + length, copy);
    for (int64_t t = 0; t < length; ++t) {
      const int64_t begin = std::max<int64_t>(0, t - half);
      const int64_t end = std::min(length, t + half + 1);
      float sum = 0.0f;
      for (int64_t i = begin; i < end; ++i) sum += copy[i];
      row[t] = sum / divisor;
    }
    return;
  }
  scratch[0] = 0.0;
  for (int64_t t = 0; t < length; ++t) scratch[t + 1] = scratch[t] + row[t];
  for (int64_t t = 0; t < length; ++t) {
    // Half a kernel may be longer than the row.
    const int64_t begin = t > half ? t - half : 0;
    const int64_t end = length - t > half ? t + half + 1 : length;
    row[t] = static_cast<float>((scratch[end] - scratch[begin]) / static_cast<double>(kernel));
  }
}

}  // namespace

absl::Status Pool(CpuContext& context, PoolKind kind, int64_t kernel, int64_t length,
                  ScoreBuffer& x) {
  KEEPSET_RETURN_IF_ERROR(CheckPool(kernel, length, x));
  if (kernel == 1 || length == 0) return absl::OkStatus();
  float* data = x.data();
  const int64_t cols = x.cols();
  if (kind == PoolKind::kAverage) {
    KEEPSET_RETURN_IF_ERROR(
        context.ReserveSlots(SlotScratch::kStaging, (length + 1) * int64_t{sizeof(double)}));
    context.ParallelFor(x.rows(), [&](int64_t row, int slot) {
      AveragePool(data + row * cols, length, kernel,
                  context.slot(slot, SlotScratch::kStaging).as<double>());
    });
    return absl::OkStatus();
  }
  const int64_t half = std::min(kernel / 2, length);
  KEEPSET_RETURN_IF_ERROR(context.ReserveSlots(
      SlotScratch::kStaging, SlidingScratchFloats(length, half, half) * int64_t{sizeof(float)}));
  context.ParallelFor(x.rows(), [&](int64_t row, int slot) {
    SlidingMax(data + row * cols, length, half, half,
               context.slot(slot, SlotScratch::kStaging).as<float>());
  });
  return absl::OkStatus();
}

absl::Status DilateForward(CpuContext& context, int64_t dilate, ScoreBuffer& x) {
  KEEPSET_RETURN_IF_ERROR(CheckDilate(dilate));
  if (dilate == 0) return absl::OkStatus();
  const int64_t cols = x.cols();
  const int64_t before = std::min(dilate, cols);
  float* data = x.data();
  KEEPSET_RETURN_IF_ERROR(context.ReserveSlots(
      SlotScratch::kStaging, SlidingScratchFloats(cols, before, 0) * int64_t{sizeof(float)}));
  context.ParallelFor(x.rows(), [&](int64_t row, int slot) {
    SlidingMax(data + row * cols, cols, before, 0,
               context.slot(slot, SlotScratch::kStaging).as<float>());
  });
  return absl::OkStatus();
}

}  // namespace keepset::kernels::cpu
