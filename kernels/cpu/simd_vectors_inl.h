// The vector types of one SIMD target, the width of a panel of tokens and the exact loads of tensor
// elements. Included once per target, by the files that hwy/foreach_target.h compiles per target.
#if defined(KEEPSET_KERNELS_CPU_SIMD_VECTORS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KEEPSET_KERNELS_CPU_SIMD_VECTORS_INL_H_
#undef KEEPSET_KERNELS_CPU_SIMD_VECTORS_INL_H_
#else
#define KEEPSET_KERNELS_CPU_SIMD_VECTORS_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/views.h"

HWY_BEFORE_NAMESPACE();
namespace keepset::kernels::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using FloatVec = hn::Vec<FloatTag>;

// Vectors of tokens that share one broadcast of a query element.
constexpr int kPanelVectors = 3;

HWY_INLINE int64_t PanelWidth() {
  return kPanelVectors * static_cast<int64_t>(hn::Lanes(FloatTag()));
}

// 16-bit elements in the low halves of 32-bit lanes to fp32, exact.
template <DType kType, class D, class Bits>
HWY_INLINE hn::Vec<D> WidenBits(D d, Bits bits) {
  const hn::Rebind<uint32_t, D> wide;
  if constexpr (kType == DType::kBF16) {
    return hn::BitCast(d, hn::ShiftLeft<16>(bits));
  } else {
    // As HalfToFloat in element.cc.
    const auto magnitude =
        hn::Mul(hn::BitCast(d, hn::ShiftLeft<13>(hn::And(bits, hn::Set(wide, 0x7fffu)))),
                hn::Set(d, 0x1p112f));
    const auto special = hn::IfThenElseZero(hn::Ge(magnitude, hn::Set(d, 65536.0f)),
                                            hn::BitCast(d, hn::Set(wide, 0x7f800000u)));
    const auto sign = hn::BitCast(d, hn::ShiftLeft<16>(hn::And(bits, hn::Set(wide, 0x8000u))));
    return hn::Or(hn::Or(magnitude, special), sign);
  }
}

template <DType kType, class D>
HWY_INLINE hn::Vec<D> LoadWide(D d, const std::byte* data) {
  if constexpr (kType == DType::kF32) {
    return hn::LoadU(d, reinterpret_cast<const float*>(data));
  } else {
    const hn::Rebind<uint16_t, D> narrow;
    const hn::Rebind<uint32_t, D> wide;
    return WidenBits<kType>(
        d, hn::PromoteTo(wide, hn::LoadU(narrow, reinterpret_cast<const uint16_t*>(data))));
  }
}

template <DType kType>
HWY_INLINE float LoadOne(const std::byte* data) {
  const hn::CappedTag<float, 1> one;
  return hn::GetLane(LoadWide<kType>(one, data));
}

HWY_INLINE float SumLanes(FloatTag d, FloatVec v) { return hn::GetLane(hn::SumOfLanes(d, v)); }

}  // namespace HWY_NAMESPACE
}  // namespace keepset::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // KEEPSET_KERNELS_CPU_SIMD_VECTORS_INL_H_
