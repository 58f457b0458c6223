#include "kernels/cpu/pack_simd.h"

#include <algorithm>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/pack_simd.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include "hwy/highway.h"
#include "kernels/cpu/simd_vectors_inl.h"

HWY_BEFORE_NAMESPACE();
namespace keepset::kernels::cpu {
namespace HWY_NAMESPACE {

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
  return Pack(d, rows, count, head_dim, dtype, PanelWidth(), 1.0f, staging, panels);
}

bool PackQueriesImpl(const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
                     float scale, float* staging, float* queries) {
  // The last vector may not reach the end of the block.
  if (count < kRowBlock) std::fill(queries, queries + head_dim * kRowBlock, 0.0f);
  return Pack(QueryTag(), rows, count, head_dim, dtype, kRowBlock, scale, staging, queries);
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

}  // namespace HWY_NAMESPACE
}  // namespace keepset::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace keepset::kernels::cpu {
namespace {

HWY_EXPORT(PackTokensImpl);
HWY_EXPORT(PackQueriesImpl);
HWY_EXPORT(WidenImpl);

}  // namespace

bool PackTokens(const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
                float* staging, float* panels) {
  return HWY_DYNAMIC_DISPATCH(PackTokensImpl)(rows, count, head_dim, dtype, staging, panels);
}

bool PackQueries(const std::byte* const* rows, int64_t count, int64_t head_dim, DType dtype,
                 float scale, float* staging, float* queries) {
  return HWY_DYNAMIC_DISPATCH(PackQueriesImpl)(rows, count, head_dim, dtype, scale, staging,
                                               queries);
}

void Widen(const std::byte* data, int64_t count, DType dtype, float* out) {
  HWY_DYNAMIC_DISPATCH(WidenImpl)(data, count, dtype, out);
}

}  // namespace keepset::kernels::cpu
#endif  // HWY_ONCE
