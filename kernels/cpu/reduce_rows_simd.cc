#include "kernels/cpu/reduce_rows_simd.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/reduce_rows_simd.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include "hwy/highway.h"
#include "kernels/cpu/chunk_shape.h"
#include "kernels/cpu/simd_vectors_inl.h"

HWY_BEFORE_NAMESPACE();
namespace keepset::kernels::cpu {
namespace HWY_NAMESPACE {

// Vectors of columns that are summed at a time: with 32 registers a whole row of a chunk, so that
// the values stream through in the order of memory.
#if HWY_TARGET <= HWY_AVX3 && HWY_TARGET != HWY_SCALAR
constexpr int kReduceVectors = 24;
#else
constexpr int kReduceVectors = 8;
#endif

template <bool kIsMax, bool kHasFactors, int kVectors>
HWY_INLINE void ReduceTile(const float* HWY_RESTRICT values, int64_t row_stride,
                           const float* HWY_RESTRICT factors, int64_t num_rows, FloatVec scale,
                           float* HWY_RESTRICT out) {
  const FloatTag d;
  const int64_t lanes = hn::Lanes(d);
  FloatVec acc[kVectors];
#pragma GCC unroll 24
  for (int v = 0; v < kVectors; ++v) acc[v] = hn::Zero(d);
  for (int64_t i = 0; i < num_rows; ++i) {
    const FloatVec factor = hn::Set(d, kHasFactors ? factors[i] : 1.0f);
#pragma GCC unroll 24
    for (int v = 0; v < kVectors; ++v) {
      const FloatVec x = hn::LoadU(d, values + v * lanes);
      if constexpr (kIsMax) {
        acc[v] = hn::Max(acc[v], kHasFactors ? hn::Mul(x, factor) : x);
      } else {
        acc[v] = kHasFactors ? hn::MulAdd(x, factor, acc[v]) : hn::Add(acc[v], x);
      }
    }
    values += row_stride;
  }
#pragma GCC unroll 24
  for (int v = 0; v < kVectors; ++v) hn::StoreU(hn::Div(acc[v], scale), d, out + v * lanes);
}

template <bool kIsMax, bool kHasFactors>
void ReduceColumns(const float* values, int64_t row_stride, const float* factors, int64_t num_rows,
                   float divisor, int64_t count, float* out) {
  const FloatTag d;
  const int64_t lanes = hn::Lanes(d);
  const FloatVec scale = hn::Set(d, divisor);
  int64_t t = 0;
  for (; t + kReduceVectors * lanes <= count; t += kReduceVectors * lanes) {
    ReduceTile<kIsMax, kHasFactors, kReduceVectors>(values + t, row_stride, factors, num_rows,
                                                    scale, out + t);
  }
  for (; t + lanes <= count; t += lanes) {
    ReduceTile<kIsMax, kHasFactors, 1>(values + t, row_stride, factors, num_rows, scale, out + t);
  }
  if (t < count) {
    float last[kMaxLanes];
    ReduceTile<kIsMax, kHasFactors, 1>(values + t, row_stride, factors, num_rows, scale, last);
    std::copy(last, last + (count - t), out + t);
  }
}

void ReduceRowsImpl(const float* values, int64_t row_stride, const float* factors, int64_t num_rows,
                    RowReduction reduction, int64_t num_divisor, int64_t count, float* out) {
  const float divisor = reduction == RowReduction::kMean ? static_cast<float>(num_divisor) : 1.0f;
  if (reduction == RowReduction::kLast && num_rows > 1) {
    values += (num_rows - 1) * row_stride;
    if (factors != nullptr) factors += num_rows - 1;
    num_rows = 1;
  }
  const bool is_max = reduction == RowReduction::kMax;
  if (factors != nullptr) {
    if (is_max) {
      ReduceColumns<true, true>(values, row_stride, factors, num_rows, divisor, count, out);
    } else {
      ReduceColumns<false, true>(values, row_stride, factors, num_rows, divisor, count, out);
    }
  } else if (is_max) {
    ReduceColumns<true, false>(values, row_stride, factors, num_rows, divisor, count, out);
  } else {
    ReduceColumns<false, false>(values, row_stride, factors, num_rows, divisor, count, out);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace keepset::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace keepset::kernels::cpu {
namespace {

HWY_EXPORT(ReduceRowsImpl);

}  // namespace

void ReduceRows(const float* values, int64_t row_stride, const float* factors, int64_t num_rows,
                RowReduction reduction, int64_t num_divisor, int64_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(ReduceRowsImpl)
  (values, row_stride, factors, num_rows, reduction, num_divisor, count, out);
}

}  // namespace keepset::kernels::cpu
#endif  // HWY_ONCE
