// Value norms beside HopperColumns: the warps of the loading group that load no keys stream the
// value rows of the block's tiles through shared memory of their own.
#ifndef KEEPSET_KERNELS_CUDA_HOPPER_NORMS_INL_H_
#define KEEPSET_KERNELS_CUDA_HOPPER_NORMS_INL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/hopper_pipeline_inl.h"
#include "kernels/cuda/hopper_segment_inl.h"
#include "kernels/cuda/hopper_window.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/row_norm_inl.h"

namespace keepset::kernels::cuda {

// Value norms of some tiles of a segment by one warp, with the bits of WarpRowNorms. Rows pass
// through shared memory, of which each lane reads what it copied itself, so that many are on their
// way.
class NormStream {
 public:
  // buffer: kNormWarpBytes of this warp.
  template <typename Simt>
  KEEPSET_KERNEL_BODY NormStream(const Simt& simt, const WindowParams& p,
                                 const ColumnSegment& segment, std::byte* buffer)
      : v_(p.shape.v),
        segment_(segment),
        buffer_(buffer + simt.lane() * 16),
        pieces_(static_cast<int>(PiecesPerRow(v_))),
        rows_at_once_(pieces_ > 0 && pieces_ < 32 ? 32 / pieces_ : 1),
        lane_row_(pieces_ > 0 ? simt.lane() / pieces_ : 0),
        lane_piece_(simt.lane() - lane_row_ * pieces_) {
    v_.data = p.layers[segment.at.layer].v;
    v_.block_table = p.layers[segment.at.layer].v_table;
  }

  // Tiles warp - 1, warp + 2, ... of the segment.
  template <typename Simt>
  KEEPSET_KERNEL_BODY void Run(const Simt& simt, const WindowParams& p) const {
    const int first = simt.warp() - 1;
    const int tiles = (segment_.num_tiles - first + kGroupWarps - 2) / (kGroupWarps - 1);
    if (!HasAlignedRows(v_) || pieces_ < 2 || pieces_ > 32 || (pieces_ & (pieces_ - 1)) != 0) {
      for (int i = 0; i < tiles; ++i) {
        Careful(simt, p, Token(simt, i), kColumnTokens);
      }
      return;
    }
    const int rows = kNormLoads * rows_at_once_;  // <= kColumnTokens
    const int batches = kColumnTokens / rows;
    const int count = tiles * batches;
    const auto token_of = [&](int batch) {
      const int tile = batch / batches;
      return Token(simt, tile) + (batch - tile * batches) * rows;
    };
    for (int batch = 0; batch < kNormDepth - 1; ++batch) {
      Copy(simt, batch < count ? token_of(batch) : v_.num_tokens, batch);
    }
    KEEPSET_NO_UNROLL
    for (int batch = 0; batch < count; ++batch) {
      const int next = batch + kNormDepth - 1;
      Copy(simt, next < count ? token_of(next) : v_.num_tokens, next);
      simt.template WaitCopies<kNormDepth - 1>();
      const int token = token_of(batch);
      if (!Sum(simt, p, token, batch)) Careful(simt, p, token, rows);
    }
  }

 private:
  template <typename Simt>
  KEEPSET_KERNEL_BODY int Token(const Simt& simt, int tile) const {
    return (segment_.first_tile + simt.warp() - 1 + tile * (kGroupWarps - 1)) * kColumnTokens;
  }
  KEEPSET_KERNEL_BODY std::byte* Buffer(int batch, int load) const {
    return buffer_ + ((batch & (kNormDepth - 1)) * kNormLoads + load) * 512;
  }
  KEEPSET_KERNEL_BODY float* Norms(const WindowParams& p) const {
    return p.layers[segment_.at.layer].value_norms + FirstPlace();
  }
  KEEPSET_KERNEL_BODY int64_t FirstPlace() const {
    return static_cast<int64_t>(segment_.at.unit.kv_head) * segment_.at.k.num_tokens;
  }

  template <typename Simt>
  KEEPSET_KERNEL_BODY void Copy(const Simt& simt, int token, int batch) const {
    KEEPSET_UNROLL
    for (int j = 0; j < kNormLoads; ++j) {
      const int row = token + j * rows_at_once_ + lane_row_;
      const bool is_used = row < v_.num_tokens;
      const std::byte* const from =
          is_used ? v_.Row(segment_.at.unit.kv_head, row) + lane_piece_ * 16 : v_.data;
      simt.CopyAsync16(Buffer(batch, j), from, is_used);
    }
    simt.CommitCopies();
  }

  // False when a norm is not finite.
  template <typename Simt>
  KEEPSET_KERNEL_BODY bool Sum(const Simt& simt, const WindowParams& p, int token,
                               int batch) const {
    bool is_finite = true;
    KEEPSET_UNROLL
    for (int j = 0; j < kNormLoads; ++j) {
      const Piece piece = *reinterpret_cast<const Piece*>(Buffer(batch, j));
      float sum = SumOfSquares<float>(piece, v_.dtype);
      for (int mask = pieces_ / 2; mask > 0; mask /= 2) sum += simt.ShuffleXor(sum, mask);
      const float norm = simt.Sqrt(sum);
      is_finite = is_finite && IsFiniteValue(norm);
      const int row = token + j * rows_at_once_ + lane_row_;
      if (row < v_.num_tokens && lane_piece_ == 0) Norms(p)[row] = norm;
    }
    return simt.Ballot(!is_finite) == 0;
  }

  template <typename Simt>
  KEEPSET_KERNEL_BODY void Careful(const Simt& simt, const WindowParams& p, int token,
                                   int rows) const {
    const int left = v_.num_tokens - token;
    WarpRowNorms(simt, v_, segment_.at.unit.kv_head, token, left < rows ? left : rows,
                 FirstPlace() + token, Norms(p) + token, p.layers[segment_.at.layer].value_fault);
  }

  DeviceRows v_;
  const ColumnSegment& segment_;
  std::byte* buffer_;
  int pieces_;
  int rows_at_once_;
  int lane_row_;
  int lane_piece_;
};

// The share of a block's tiles of the warps beside the loading one, which take tiles in turns.
template <typename Simt>
KEEPSET_KERNEL_BODY inline void NormRange(const Simt& simt, const HopperParams& p,
                                          const TaskRange& range, std::byte* buffer) {
  for (int64_t task = range.begin; task < range.end;) {
    const ColumnSegment segment = FindSegment(p, task, range.end);
    task += segment.num_tiles;
    if (segment.part.is_first == 0 || p.window.layers[segment.at.layer].value_norms == nullptr) {
      continue;
    }
    NormStream(simt, p.window, segment, buffer).Run(simt, p.window);
  }
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_HOPPER_NORMS_INL_H_
