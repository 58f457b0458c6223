#include "kernels/cpu/logits_simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/logits_simd.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include "hwy/highway.h"
#include "kernels/cpu/simd_vectors_inl.h"

HWY_BEFORE_NAMESPACE();
namespace keepset::kernels::cpu {
namespace HWY_NAMESPACE {

// Query rows of a register tile: with 32 registers eight rows of accumulators fit beside the three
// vectors of tokens, with 16 registers four.
#if HWY_TARGET <= HWY_AVX3 || HWY_TARGET == HWY_NEON
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

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

static_assert(kPanelVectors == 3);

template <int kRows>
void TileRowLogits(const float* queries, const float* panels, int64_t count, int64_t head_dim,
                   float* logits) {
  const int64_t lanes = hn::Lanes(FloatTag());
  const int64_t panel_width = PanelWidth();
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

}  // namespace HWY_NAMESPACE
}  // namespace keepset::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace keepset::kernels::cpu {
namespace {

HWY_EXPORT(BlockLogitsImpl);

}  // namespace

void BlockLogits(const float* queries, int64_t num_rows, const float* panels, int64_t count,
                 int64_t head_dim, float* logits) {
  HWY_DYNAMIC_DISPATCH(BlockLogitsImpl)(queries, num_rows, panels, count, head_dim, logits);
}

}  // namespace keepset::kernels::cpu
#endif  // HWY_ONCE
