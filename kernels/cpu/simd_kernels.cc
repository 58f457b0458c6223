#include "kernels/cpu/simd_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/simd_kernels.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace keepset::kernels::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using IntTag = hn::Rebind<int32_t, FloatTag>;
using FloatVec = hn::Vec<FloatTag>;

// Three vectors of tokens share one broadcast of a query element; with 32 registers eight rows of
// accumulators fit beside them, with 16 registers four.
constexpr int kPanelVectors = 3;
#if HWY_TARGET <= HWY_AVX3 || HWY_TARGET == HWY_NEON
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

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

HWY_INLINE float SumLanes(FloatTag d, FloatVec v) { return hn::GetLane(hn::SumOfLanes(d, v)); }
HWY_INLINE float MaxLanes(FloatTag d, FloatVec v) { return hn::GetLane(hn::MaxOfLanes(d, v)); }

int64_t TargetId() { return HWY_TARGET; }

// Rows to panels [ceil(count / panel_width)][head_dim][panel_width], each element times `scale`,
// padded with zeros to a multiple of the vector length. False when an element is not finite.
#if HWY_TARGET == HWY_SCALAR

template <DType kType, class D>
bool PackTyped(D d, const std::byte* const* rows, int64_t count, int64_t head_dim,
               int64_t panel_width, float scale, float* /*staging*/, float* panels) {
  float check = 0.0f;
  const int64_t lanes = hn::Lanes(d);
  const int64_t padded = (count + lanes - 1) / lanes * lanes;
  for (int64_t t = 0; t < padded; ++t) {
    float* column = panels + t / panel_width * panel_width * head_dim + t % panel_width;
    for (int64_t c = 0; c < head_dim; ++c) {
      const float value = t < count ? LoadOne<kType>(rows[t] + c * DTypeBytes(kType)) : 0.0f;
      column[c * panel_width] = value * scale;
      check += value * 0.0f;
    }
  }
  return check == 0.0f;
}

using QueryTag = FloatTag;

#else

// Transposes 4x4 inside each block of 128 bits of a0..a3: r0 holds the first element of every
// block of all four, and so on.
template <class DU, class V>
HWY_INLINE void TransposeBlocks(DU du, V a0, V a1, V a2, V a3, V& r0, V& r1, V& r2, V& r3) {
  const hn::Repartition<uint64_t, DU> d64;
  const auto low01 = hn::BitCast(d64, hn::InterleaveLower(du, a0, a1));
  const auto low23 = hn::BitCast(d64, hn::InterleaveLower(du, a2, a3));
  const auto high01 = hn::BitCast(d64, hn::InterleaveUpper(du, a0, a1));
  const auto high23 = hn::BitCast(d64, hn::InterleaveUpper(du, a2, a3));
  r0 = hn::BitCast(du, hn::InterleaveLower(d64, low01, low23));
  r1 = hn::BitCast(du, hn::InterleaveUpper(d64, low01, low23));
  r2 = hn::BitCast(du, hn::InterleaveLower(d64, high01, high23));
  r3 = hn::BitCast(du, hn::InterleaveUpper(d64, high01, high23));
}

// A vector of staging memory consists of blocks of 128 bits, block b a piece of token 4 * b + k,
// so that a 4x4 transpose inside the blocks of four such vectors (k = 0..3) yields vectors of
// tokens. A block is four channels of fp32, or eight of 16 bits, which move in pairs until then.
template <DType kType, class D>
bool PackTyped(D d, const std::byte* const* rows, int64_t count, int64_t head_dim,
               int64_t panel_width, float scale, float* staging_memory, float* panels) {
  constexpr int64_t kBlockBytes = 16;
  constexpr int64_t kChannels = kBlockBytes / DTypeBytes(kType);  // of one block
  constexpr int64_t kPerLane = kChannels / 4;                     // channels that share a lane
  using V = hn::Vec<D>;
  const hn::RebindToUnsigned<D> du;
  const hn::FixedTag<uint8_t, kBlockBytes> d_bytes;
  auto* staging = reinterpret_cast<uint32_t*>(staging_memory);
  const int64_t lanes = hn::Lanes(d);
  const int64_t row_bytes = head_dim * DTypeBytes(kType);
  const int64_t whole_bytes = row_bytes / kBlockBytes * kBlockBytes;
  const V zero = hn::Zero(d);
  const V factor = hn::Set(d, scale);
  V checks[4] = {zero, zero, zero, zero};

  for (int64_t begin = 0; begin < count; begin += lanes) {
    for (int64_t t = 0; t < lanes; ++t) {
      auto* to = reinterpret_cast<uint8_t*>(staging + t % 4 * lanes + t / 4 * 4);
      const int64_t step = 4 * lanes * int64_t{sizeof(uint32_t)};  // to the next block of the token
      if (begin + t >= count) {
        for (int64_t byte = 0; byte < row_bytes; byte += kBlockBytes, to += step) {
          hn::StoreU(hn::Zero(d_bytes), d_bytes, to);
        }
        continue;
      }
      const auto* row = reinterpret_cast<const uint8_t*>(rows[begin + t]);
      for (int64_t byte = 0; byte < whole_bytes; byte += kBlockBytes, to += step) {
        hn::StoreU(hn::LoadU(d_bytes, row + byte), d_bytes, to);
      }
      if (whole_bytes < row_bytes) {
        std::memset(to, 0, kBlockBytes);
        std::memcpy(to, row + whole_bytes, row_bytes - whole_bytes);
      }
    }
    float* panel = panels + begin / panel_width * panel_width * head_dim + begin % panel_width;
    for (int64_t c = 0; c < head_dim; c += kChannels) {
      const uint32_t* from = staging + c / kChannels * 4 * lanes;
      hn::Vec<decltype(du)> r[4];
      TransposeBlocks(du, hn::LoadU(du, from), hn::LoadU(du, from + lanes),
                      hn::LoadU(du, from + 2 * lanes), hn::LoadU(du, from + 3 * lanes), r[0], r[1],
                      r[2], r[3]);
      float* to = panel + c * panel_width;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (c + i * kPerLane >= head_dim) break;
        V first = zero;
        if constexpr (kType == DType::kF32) {
          first = hn::BitCast(d, r[i]);
        } else {
          first = WidenBits<kType>(d, hn::And(r[i], hn::Set(du, 0xffffu)));
        }
        checks[i] = hn::MulAdd(first, zero, checks[i]);
        hn::StoreU(hn::Mul(first, factor), d, to + i * kPerLane * panel_width);
        if constexpr (kPerLane == 2) {
          if (c + 2 * i + 1 >= head_dim) break;
          const V second = WidenBits<kType>(d, hn::ShiftRight<16>(r[i]));
          checks[i] = hn::MulAdd(second, zero, checks[i]);
          hn::StoreU(hn::Mul(second, factor), d, to + (2 * i + 1) * panel_width);
        }
      }
    }
  }
  const V check = hn::Add(hn::Add(checks[0], checks[1]), hn::Add(checks[2], checks[3]));
  return hn::AllTrue(d, hn::Eq(check, zero));
}

using QueryTag = hn::FixedTag<float, 4>;

#endif  // HWY_TARGET == HWY_SCALAR

template <class D>
bool Pack(D d, const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
          int64_t panel_width, float scale, float* staging, float* panels) {
  switch (dtype) {
    case DType::kF32:
      return PackTyped<DType::kF32>(d, rows, count, head_dim, panel_width, scale, staging, panels);
    case DType::kF16:
      return PackTyped<DType::kF16>(d, rows, count, head_dim, panel_width, scale, staging, panels);
    case DType::kBF16:
      return PackTyped<DType::kBF16>(d, rows, count, head_dim, panel_width, scale, staging, panels);
  }
  return false;
}

bool PackTokensImpl(const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
                    float* staging, float* panels) {
  const FloatTag d;
  const int64_t panel_width = kPanelVectors * static_cast<int64_t>(hn::Lanes(d));
  return Pack(d, rows, count, head_dim, dtype, panel_width, 1.0f, staging, panels);
}

bool PackQueriesImpl(const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
                     float scale, float* staging, float* queries) {
  // The last vector may not reach the end of the block.
  if (count < kRowBlock) std::fill(queries, queries + head_dim * kRowBlock, 0.0f);
  return Pack(QueryTag(), rows, count, head_dim, dtype, kRowBlock, scale, staging, queries);
}

// One register tile: kRows query rows by kVectors vectors of tokens.
template <int kRows, int kVectors>
HWY_INLINE void LogitsTile(const float* HWY_RESTRICT queries, const float* HWY_RESTRICT panel,
                           int64_t panel_width, int64_t head_dim, float* HWY_RESTRICT logits) {
  const FloatTag d;
  const int64_t lanes = hn::Lanes(d);
  FloatVec sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sums[r][v] = hn::Zero(d);
  }
  for (int64_t c = 0; c < head_dim; ++c) {
    FloatVec tokens[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) tokens[v] = hn::LoadU(d, panel + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const FloatVec query = hn::Set(d, queries[r]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sums[r][v] = hn::MulAdd(query, tokens[v], sums[r][v]);
    }
    panel += panel_width;
    queries += kRowBlock;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      hn::StoreU(sums[r][v], d, logits + r * kChunkTokens + v * lanes);
    }
  }
}

template <int kRows>
void TileRowLogits(const float* queries, const float* panels, int64_t count, int64_t head_dim,
                   float* logits) {
  const int64_t lanes = hn::Lanes(FloatTag());
  const int64_t panel_width = kPanelVectors * lanes;
  for (int64_t begin = 0; begin < count; begin += panel_width) {
    const float* panel = panels + begin * head_dim;
    const int64_t left = count - begin;
    if (left > 2 * lanes) {
      LogitsTile<kRows, 3>(queries, panel, panel_width, head_dim, logits + begin);
    } else if (left > lanes) {
      LogitsTile<kRows, 2>(queries, panel, panel_width, head_dim, logits + begin);
    } else {
      LogitsTile<kRows, 1>(queries, panel, panel_width, head_dim, logits + begin);
    }
  }
}

void BlockLogitsImpl(const float* queries, int64_t num_rows, const float* panels, int64_t count,
                     int64_t head_dim, float* logits) {
  if constexpr (kTileRows == 8) {
    if (num_rows > 4) {
      TileRowLogits<8>(queries, panels, count, head_dim, logits);
      return;
    }
    TileRowLogits<4>(queries, panels, count, head_dim, logits);
  } else {
    TileRowLogits<4>(queries, panels, count, head_dim, logits);
    if (num_rows > 4) {
      TileRowLogits<4>(queries + 4, panels, count, head_dim, logits + 4 * kChunkTokens);
    }
  }
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

template <DType kType>
void WidenTyped(const std::byte* data, int64_t count, float* out) {
  const FloatTag d;
  const int64_t lanes = hn::Lanes(d);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    hn::StoreU(LoadWide<kType>(d, data + i * DTypeBytes(kType)), d, out + i);
  }
  for (; i < count; ++i) out[i] = LoadOne<kType>(data + i * DTypeBytes(kType));
}

void WidenImpl(const std::byte* data, int64_t count, DType dtype, float* out) {
  switch (dtype) {
    case DType::kF32:
      return WidenTyped<DType::kF32>(data, count, out);
    case DType::kF16:
      return WidenTyped<DType::kF16>(data, count, out);
    case DType::kBF16:
      return WidenTyped<DType::kBF16>(data, count, out);
  }
}

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

HWY_EXPORT(TargetId);
HWY_EXPORT(PackTokensImpl);
HWY_EXPORT(PackQueriesImpl);
HWY_EXPORT(BlockLogitsImpl);
HWY_EXPORT(ExpBelowMaxImpl);
HWY_EXPORT(ExpBelowImpl);
HWY_EXPORT(ChunkFactorsImpl);
HWY_EXPORT(ReduceRowsImpl);
HWY_EXPORT(WidenImpl);
HWY_EXPORT(FastNormsImpl);
HWY_EXPORT(RunFmaChainsImpl);

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

bool PackTokens(const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
                float* staging, float* panels) {
  return HWY_DYNAMIC_DISPATCH(PackTokensImpl)(rows, count, head_dim, dtype, staging, panels);
}

bool PackQueries(const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
                 float scale, float* staging, float* queries) {
  return HWY_DYNAMIC_DISPATCH(PackQueriesImpl)(rows, count, head_dim, dtype, scale, staging,
                                               queries);
}

void BlockLogits(const float* queries, int64_t num_rows, const float* panels, int64_t count,
                 int64_t head_dim, float* logits) {
  HWY_DYNAMIC_DISPATCH(BlockLogitsImpl)(queries, num_rows, panels, count, head_dim, logits);
}

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

void ReduceRows(const float* values, int64_t row_stride, const float* factors, int64_t num_rows,
                RowReduction reduction, int64_t num_divisor, int64_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(ReduceRowsImpl)
  (values, row_stride, factors, num_rows, reduction, num_divisor, count, out);
}

void Widen(const std::byte* data, int64_t count, DType dtype, float* out) {
  HWY_DYNAMIC_DISPATCH(WidenImpl)(data, count, dtype, out);
}

void FastNorms(const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
               float* norms) {
  HWY_DYNAMIC_DISPATCH(FastNormsImpl)(rows, count, head_dim, dtype, norms);
}

double RunFmaChains(int64_t iterations, float* sink) {
  return HWY_DYNAMIC_DISPATCH(RunFmaChainsImpl)(iterations, sink);
}

}  // namespace keepset::kernels::cpu
#endif  // HWY_ONCE
