#include "kernels/cpu/simd_target.h"

#include <cstdint>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/simd_target.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace keepset::kernels::cpu {
namespace HWY_NAMESPACE {

int64_t TargetId() { return HWY_TARGET; }

}  // namespace HWY_NAMESPACE
}  // namespace keepset::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace keepset::kernels::cpu {
namespace {

HWY_EXPORT(TargetId);

}  // namespace

const char* SimdTargetName() {
  switch (HWY_DYNAMIC_DISPATCH(TargetId)()) {
    case HWY_AVX3:
    case HWY_AVX3_DL:
      return "avx512";
    case HWY_AVX2:
      return "avx2";
    case HWY_SSE4:
      return "sse4";
    case HWY_SSSE3:
      return "ssse3";
    case HWY_NEON:
      return "neon";
    default:
      return "portable";
  }
}

}  // namespace keepset::kernels::cpu
#endif  // HWY_ONCE
