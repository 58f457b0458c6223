#include "kernels/cpu/fma_chains_simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/fma_chains_simd.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include "hwy/highway.h"
#include "kernels/cpu/simd_vectors_inl.h"

HWY_BEFORE_NAMESPACE();
namespace keepset::kernels::cpu {
namespace HWY_NAMESPACE {

double RunFmaChainsImpl(int64_t iterations, float* sink) {
  const FloatTag d;
  constexpr int kChains = 12;
  constexpr int kSteps = 84;
  FloatVec chains[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) chains[i] = hn::Set(d, static_cast<float>(i) + *sink);
  const FloatVec factor = hn::Set(d, 0.5f + *sink);
  for (int64_t n = 0; n < iterations * kSteps; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chains[i] = hn::MulAdd(chains[i], factor, factor);
  }
  FloatVec sum = hn::Zero(d);
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum = hn::Add(sum, chains[i]);
  *sink = SumLanes(d, sum);
  return 2.0 * kChains * kSteps * static_cast<double>(iterations) *
         static_cast<double>(hn::Lanes(d));
}

}  // namespace HWY_NAMESPACE
}  // namespace keepset::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace keepset::kernels::cpu {
namespace {

HWY_EXPORT(RunFmaChainsImpl);

}  // namespace

double RunFmaChains(int64_t iterations, float* sink) {
  return HWY_DYNAMIC_DISPATCH(RunFmaChainsImpl)(iterations, sink);
}

}  // namespace keepset::kernels::cpu
#endif  // HWY_ONCE
