#include "kernels/cpu/exp_simd.h"

#include <algorithm>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/exp_simd.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include "hwy/highway.h"
#include "kernels/cpu/simd_vectors_inl.h"

HWY_BEFORE_NAMESPACE();
namespace keepset::kernels::cpu {
namespace HWY_NAMESPACE {

using IntTag = hn::Rebind<int32_t, FloatTag>;

// 2^x for x in [-inf, 127], relative error below 2^-22; results below 2^-125 are 0. The polynomial
// is a minimax fit of 2^f on [-1/2, 1/2] with the constant term fixed to 1.
HWY_INLINE FloatVec Exp2(FloatTag d, FloatVec x) {
  const IntTag di;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
  const FloatVec magic = hn::Set(d, 12582912.0f);
  const FloatVec clamped = hn::Max(x, hn::Set(d, -126.0f));
  const FloatVec shifted = hn::Add(clamped, magic);
  const FloatVec f = hn::Sub(clamped, hn::Sub(shifted, magic));
  FloatVec p = hn::Set(d, 1.535336196e-04f);
  p = hn::MulAdd(p, f, hn::Set(d, 1.339887502e-03f));
  p = hn::MulAdd(p, f, hn::Set(d, 9.618436918e-03f));
  p = hn::MulAdd(p, f, hn::Set(d, 5.550332367e-02f));
  p = hn::MulAdd(p, f, hn::Set(d, 2.402264774e-01f));
  p = hn::MulAdd(p, f, hn::Set(d, 6.931471825e-01f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const auto scaled = hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::BitCast(di, shifted)));
  return hn::IfThenElseZero(hn::Ge(x, hn::Set(d, -125.0f)), hn::BitCast(d, scaled));
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Maximum of `count` >= 1 logits; *is_finite is cleared when one of them is NaN or infinite.
HWY_INLINE float MaxLogit(FloatTag d, const float* HWY_RESTRICT logits, int64_t count,
                          bool* is_finite) {
  const int64_t lanes = hn::Lanes(d);
  const FloatVec zero = hn::Zero(d);
  FloatVec max0 = hn::Set(d, logits[0]);
  FloatVec max1 = max0, max2 = max0, max3 = max0;
  FloatVec check0 = zero, check1 = zero, check2 = zero, check3 = zero;
  int64_t t = 0;
  for (; t + 4 * lanes <= count; t += 4 * lanes) {
    const FloatVec x0 = hn::LoadU(d, logits + t);
    const FloatVec x1 = hn::LoadU(d, logits + t + lanes);
    const FloatVec x2 = hn::LoadU(d, logits + t + 2 * lanes);
    const FloatVec x3 = hn::LoadU(d, logits + t + 3 * lanes);
    max0 = hn::Max(max0, x0);
    max1 = hn::Max(max1, x1);
    max2 = hn::Max(max2, x2);
    max3 = hn::Max(max3, x3);
    check0 = hn::MulAdd(x0, zero, check0);
    check1 = hn::MulAdd(x1, zero, check1);
    check2 = hn::MulAdd(x2, zero, check2);
    check3 = hn::MulAdd(x3, zero, check3);
  }
  for (; t < count; t += lanes) {
    const FloatVec first = hn::Set(d, logits[0]);
    const FloatVec x =
        hn::IfThenElse(hn::FirstN(d, std::min(lanes, count - t)), hn::LoadU(d, logits + t), first);
    max0 = hn::Max(max0, x);
    check0 = hn::MulAdd(x, zero, check0);
  }
  const FloatVec check = hn::Add(hn::Add(check0, check1), hn::Add(check2, check3));
  *is_finite = hn::AllTrue(d, hn::Eq(check, zero));
  return hn::GetLane(hn::MaxOfLanes(d, hn::Max(hn::Max(max0, max1), hn::Max(max2, max3))));
}

// exponentials[t] = 2^(logits[t] - reference) for t < visible, 0 up to the vector that holds
// `count` - 1. Returns the vector of partial sums.
HWY_INLINE FloatVec ExpRow(FloatTag d, const float* HWY_RESTRICT logits, float reference,
                           int64_t visible, int64_t count, float* HWY_RESTRICT exponentials) {
  const int64_t lanes = hn::Lanes(d);
  const FloatVec below = hn::Set(d, reference);
  FloatVec sum0 = hn::Zero(d), sum1 = hn::Zero(d);
  int64_t t = 0;
  for (; t + 2 * lanes <= visible; t += 2 * lanes) {
    const FloatVec e0 = Exp2(d, hn::Sub(hn::LoadU(d, logits + t), below));
    const FloatVec e1 = Exp2(d, hn::Sub(hn::LoadU(d, logits + t + lanes), below));
    hn::StoreU(e0, d, exponentials + t);
    hn::StoreU(e1, d, exponentials + t + lanes);
    sum0 = hn::Add(sum0, e0);
    sum1 = hn::Add(sum1, e1);
  }
  for (; t < visible; t += lanes) {
    const FloatVec e = hn::IfThenElseZero(hn::FirstN(d, std::min(lanes, visible - t)),
                                          Exp2(d, hn::Sub(hn::LoadU(d, logits + t), below)));
    hn::StoreU(e, d, exponentials + t);
    sum0 = hn::Add(sum0, e);
  }
  for (; t < count; t += lanes) hn::StoreU(hn::Zero(d), d, exponentials + t);
  return hn::Add(sum0, sum1);
}

int64_t ExpBelowMaxImpl(const float* logits, int64_t num_rows, const int64_t* visible,
                        int64_t count, float* exponentials, float* maxes, float* sums) {
  const FloatTag d;
  // Row by row in three steps, so that the lane reductions of different rows overlap.
  for (int64_t r = 0; r < num_rows; ++r) {
    if (visible[r] == 0) continue;
    bool is_finite = true;
    maxes[r] = MaxLogit(d, logits + r * kChunkTokens, visible[r], &is_finite);
    if (!is_finite) return r;
  }
  FloatVec partial[kRowBlock];
  for (int64_t r = 0; r < num_rows; ++r) {
    if (visible[r] == 0) continue;
    partial[r] = ExpRow(d, logits + r * kChunkTokens, maxes[r], visible[r], count,
                        exponentials + r * kChunkTokens);
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    if (visible[r] != 0) sums[r] = hn::GetLane(hn::SumOfLanes(d, partial[r]));
  }
  return -1;
}

int64_t ExpBelowImpl(const float* logits, int64_t num_rows, const int64_t* visible,
                     const float* references, int64_t count, float* exponentials) {
  const FloatTag d;
  constexpr float kMostExponent = 126.0f;
  for (int64_t r = 0; r < num_rows; ++r) {
    if (visible[r] == 0) continue;
    bool is_finite = true;
    const float max = MaxLogit(d, logits + r * kChunkTokens, visible[r], &is_finite);
    if (!is_finite || !(max - references[r] <= kMostExponent)) return r;
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    if (visible[r] == 0) continue;
    ExpRow(d, logits + r * kChunkTokens, references[r], visible[r], count,
           exponentials + r * kChunkTokens);
  }
  return -1;
}

// Lanes are rows here; one lane's arithmetic is that of any other.
void ChunkFactorsImpl(const float* maxes, const float* sums, int64_t num_chunks, int64_t num_rows,
                      float* factors) {
  const FloatTag d;
  const FloatVec nothing = hn::Set(d, -kInfinity);
  const int64_t lanes = hn::Lanes(d);
  for (int64_t r = 0; r < num_rows; r += lanes) {
    FloatVec max = nothing;
    for (int64_t c = 0; c < num_chunks; ++c) {
      const FloatVec m = hn::LoadU(d, maxes + c * num_rows + r);
      const FloatVec s = hn::LoadU(d, sums + c * num_rows + r);
      max = hn::Max(max, hn::IfThenElse(hn::Gt(s, hn::Zero(d)), m, nothing));
    }
    // Compensated summation: a prompt of a million tokens has thousands of chunks.
    FloatVec sum = hn::Zero(d);
    FloatVec lost = hn::Zero(d);
    for (int64_t c = 0; c < num_chunks; ++c) {
      const FloatVec m = hn::LoadU(d, maxes + c * num_rows + r);
      const FloatVec s = hn::LoadU(d, sums + c * num_rows + r);
      const FloatVec seen = hn::IfThenElse(hn::Gt(s, hn::Zero(d)), m, nothing);
      const FloatVec weight = Exp2(d, hn::Sub(seen, max));
      hn::StoreU(weight, d, factors + c * num_rows + r);
      const FloatVec term = hn::Sub(hn::Mul(s, weight), lost);
      const FloatVec next = hn::Add(sum, term);
      lost = hn::Sub(hn::Sub(next, sum), term);
      sum = next;
    }
    for (int64_t c = 0; c < num_chunks; ++c) {
      float* factor = factors + c * num_rows + r;
      hn::StoreU(hn::Div(hn::LoadU(d, factor), sum), d, factor);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace keepset::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace keepset::kernels::cpu {
namespace {

HWY_EXPORT(ExpBelowMaxImpl);
HWY_EXPORT(ExpBelowImpl);
HWY_EXPORT(ChunkFactorsImpl);

}  // namespace

int64_t ExpBelowMax(const float* logits, int64_t num_rows, const int64_t* visible, int64_t count,
                    float* exponentials, float* maxes, float* sums) {
  return HWY_DYNAMIC_DISPATCH(ExpBelowMaxImpl)(logits, num_rows, visible, count, exponentials,
                                               maxes, sums);
}

int64_t ExpBelow(const float* logits, int64_t num_rows, const int64_t* visible,
                 const float* references, int64_t count, float* exponentials) {
  return HWY_DYNAMIC_DISPATCH(ExpBelowImpl)(logits, num_rows, visible, references, count,
                                            exponentials);
}

void ChunkFactors(const float* maxes, const float* sums, int64_t num_chunks, int64_t num_rows,
                  float* factors) {
  HWY_DYNAMIC_DISPATCH(ChunkFactorsImpl)(maxes, sums, num_chunks, num_rows, factors);
}

}  // namespace keepset::kernels::cpu
#endif  // HWY_ONCE
