#include "kernels/cpu/norms_simd.h"

#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/norms_simd.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include "hwy/highway.h"
#include "kernels/cpu/simd_vectors_inl.h"

HWY_BEFORE_NAMESPACE();
namespace keepset::kernels::cpu {
namespace HWY_NAMESPACE {

template <DType kType>
void FastNormsTyped(const std::byte* const* rows, int64_t count, int64_t head_dim, float* norms) {
  const FloatTag d;
  const int64_t lanes = hn::Lanes(d);
  const int64_t bytes = DTypeBytes(kType);
  for (int64_t i = 0; i < count; ++i) {
    const std::byte* row = rows[i];
    FloatVec sum0 = hn::Zero(d), sum1 = hn::Zero(d);
    int64_t c = 0;
    for (; c + 2 * lanes <= head_dim; c += 2 * lanes) {
      const FloatVec x0 = LoadWide<kType>(d, row + c * bytes);
      const FloatVec x1 = LoadWide<kType>(d, row + (c + lanes) * bytes);
      sum0 = hn::MulAdd(x0, x0, sum0);
      sum1 = hn::MulAdd(x1, x1, sum1);
    }
    float sum = SumLanes(d, hn::Add(sum0, sum1));
    for (; c < head_dim; ++c) {
      const float x = LoadOne<kType>(row + c * bytes);
      sum += x * x;
    }
    // The upper bound is false for NaN and for infinity.
    const bool is_normal = sum >= 0x1p-90f && sum <= 0x1p120f;
    norms[i] = is_normal ? std::sqrt(sum) : std::numeric_limits<float>::quiet_NaN();
  }
}

void FastNormsImpl(const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
                   float* norms) {
  switch (dtype) {
    case DType::kF32:
      return FastNormsTyped<DType::kF32>(rows, count, head_dim, norms);
    case DType::kF16:
      return FastNormsTyped<DType::kF16>(rows, count, head_dim, norms);
    case DType::kBF16:
      return FastNormsTyped<DType::kBF16>(rows, count, head_dim, norms);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace keepset::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace keepset::kernels::cpu {
namespace {

HWY_EXPORT(FastNormsImpl);

}  // namespace

void FastNorms(const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
               float* norms) {
  HWY_DYNAMIC_DISPATCH(FastNormsImpl)(rows, count, head_dim, dtype, norms);
}

}  // namespace keepset::kernels::cpu
#endif  // HWY_ONCE
