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

// Value norms of some tiles of a segment by one warp, with the bits of WarpRowNorms. Rows of the
// keys' type kType and of 128, 256 or 512 bytes pass through shared memory, of which each lane
// reads what it copied itself, so that many are on their way; others are read by WarpRowNorms.
template <DType kType>
class NormStream {
 public:
  // buffer: kNormWarpBytes of this warp.
  template <typename Simt>
  KEEPSET_KERNEL_BODY NormStream(const Simt& simt, const WindowParams& p,
                                 const ColumnSegment& segment, std::byte* buffer)
      : v_(p.shape.v), segment_(segment), buffer_(buffer + simt.lane() * 16) {
    v_.data = p.layers[segment.at.layer].v;
    v_.block_table = p.layers[segment.at.layer].v_table;
    norms_ = p.layers[segment.at.layer].value_norms + FirstPlace();
  }

  // Tiles warp - 1, warp + 2, ... of the segment.
  template <typename Simt>
  KEEPSET_KERNEL_BODY void Run(const Simt& simt, const WindowParams& p) const {
    const int first = simt.warp() - 1;
    const int tiles = (segment_.num_tiles - first + kGroupWarps - 2) / (kGroupWarps - 1);
    // A norm is stored once: which of two lanes stored last would not be defined.
    int done = StreamTiles(simt, tiles);
    while (done < tiles * kColumnTokens) {
      const int in_tile = done % kColumnTokens;
      const int token = Token(simt, done / kColumnTokens) + in_tile;
      const int left = v_.num_tokens - token;
      const int count = kColumnTokens - in_tile;
      WarpRowNorms(simt, v_, segment_.at.unit.kv_head, token, left < count ? left : count,
                   FirstPlace() + token, norms_ + token, p.layers[segment_.at.layer].value_fault);
      done += count;
    }
  }

 private:
  // Where the rows of a batch lie.
  enum class Spacing {
    kEven,  // token_bytes apart: contiguous, or within one block of the table
    kAny,
  };

  template <typename Simt>
  KEEPSET_KERNEL_BODY int Token(const Simt& simt, int tile) const {
    return (segment_.first_tile + simt.warp() - 1 + tile * (kGroupWarps - 1)) * kColumnTokens;
  }
  KEEPSET_KERNEL_BODY std::byte* Buffer(int batch, int load) const {
    return buffer_ + ((batch & (kNormDepth - 1)) * kNormLoads + load) * 512;
  }
  KEEPSET_KERNEL_BODY int64_t FirstPlace() const {
    return static_cast<int64_t>(segment_.at.unit.kv_head) * segment_.at.k.num_tokens;
  }

  // How many rows, counted through this warp's tiles, have their norms stored: as far as they can
  // pass through shared memory, and up to the first batch with squares that fp32 does not hold, a
  // row of zeros among them.
  template <typename Simt>
  KEEPSET_KERNEL_BODY int StreamTiles(const Simt& simt, int tiles) const {
    if (v_.dtype != kType || !HasAlignedRows(v_)) return 0;
    const int64_t pieces = PiecesPerRow(v_);
    if (pieces == 8) return StreamRows<8>(simt, tiles);
    if (pieces == 16) return StreamRows<16>(simt, tiles);
    return pieces == 32 ? StreamRows<32>(simt, tiles) : 0;
  }

  template <int kPieces, typename Simt>
  KEEPSET_KERNEL_BODY int StreamRows(const Simt& simt, int tiles) const {
    constexpr uint32_t kRows = kNormLoads * 32 / kPieces;
    const bool is_even = v_.block_table == nullptr || v_.block_size.divisor() % kRows == 0;
    return is_even ? Stream<kPieces, Spacing::kEven>(simt, tiles)
                   : Stream<kPieces, Spacing::kAny>(simt, tiles);
  }

  template <int kPieces, Spacing kSpacing, typename Simt>
  KEEPSET_KERNEL_BODY int Stream(const Simt& simt, int tiles) const {
    constexpr int kRowsAtOnce = 32 / kPieces;
    constexpr int kRows = kNormLoads * kRowsAtOnce;
    constexpr int kBatches = kColumnTokens / kRows;
    static_assert(kColumnTokens % kRows == 0 && kPieces % kNormLoads == 0);
    constexpr int kLanesPerSum = kPieces / kNormLoads;
    const int count = tiles * kBatches;
    const int lane_piece = simt.lane() % kPieces;
    // Of the row that this lane copies first, and of the one whose norm it comes to hold.
    const int copied = simt.lane() / kPieces;
    const int held = copied + lane_piece / kLanesPerSum * kRowsAtOnce;
    const auto token_of = [&](int batch) {
      return Token(simt, batch / kBatches) + batch % kBatches * kRows;
    };
    const auto copy = [&](int batch) {
      const int row = batch < count ? token_of(batch) + copied : v_.num_tokens;
      Copy<kRowsAtOnce, kSpacing>(simt, row, lane_piece * 16, batch);
    };
    for (int batch = 0; batch < kNormDepth; ++batch) copy(batch);
    int batch = 0;
    KEEPSET_NO_UNROLL
    for (; batch < count; ++batch) {
      simt.template WaitCopies<kNormDepth - 1>();
      float sums[kNormLoads];
      KEEPSET_UNROLL
      for (int j = 0; j < kNormLoads; ++j) {
        const Piece piece = *reinterpret_cast<const Piece*>(Buffer(batch, j));
        sums[j] = SumOfSquares<float>(piece, kType);
      }
      // Into the place that has just been read.
      copy(batch + kNormDepth);
      const float sum = Join<kPieces>(simt, sums);
      const int row = token_of(batch) + held;
      if (simt.Ballot(row < v_.num_tokens && !HoldsSquares(sum)) != 0) break;
      const float norm = simt.Sqrt(sum);
      if (row < v_.num_tokens && lane_piece % kLanesPerSum == 0)
        simt.StoreGlobal(norms_ + row, norm);
    }
    // Also for those that nobody reads: the next segment copies to the same places.
    simt.template WaitCopies<0>();
    return batch * kRows;
  }

  // The pieces at `offset` of rows `row`, row + kRowsAtOnce, ...
  template <int kRowsAtOnce, Spacing kSpacing, typename Simt>
  KEEPSET_KERNEL_BODY void Copy(const Simt& simt, int row, int offset, int batch) const {
    const auto place = [&](int at) {
      return at < v_.num_tokens ? v_.Row(segment_.at.unit.kv_head, at) + offset : v_.data;
    };
    const std::byte* from[kNormLoads];
    from[0] = place(row);
    KEEPSET_UNROLL
    for (int j = 1; j < kNormLoads; ++j) {
      if constexpr (kSpacing == Spacing::kEven) {
        const bool is_used = row + j * kRowsAtOnce < v_.num_tokens;
        from[j] = is_used ? from[0] + j * (kRowsAtOnce * v_.token_bytes) : v_.data;
      } else {
        from[j] = place(row + j * kRowsAtOnce);
      }
    }
    KEEPSET_UNROLL
    for (int j = 0; j < kNormLoads; ++j) {
      simt.CopyAsync16(Buffer(batch, j), from[j], row + j * kRowsAtOnce < v_.num_tokens);
    }
    simt.CommitCopies();
  }

  // sums: what a lane has of kNormLoads rows, one of each copy. The lanes of a row are halved: each
  // half gives away what it has of half of the rows, until a lane has one; the rest is added as
  // usual. A row's additions are those of WarpRowNorms, up to the order of two addends.
  template <int kPieces, typename Simt>
  KEEPSET_KERNEL_BODY static float Join(const Simt& simt, float (&sums)[kNormLoads]) {
    KEEPSET_UNROLL
    for (int half = kNormLoads / 2; half > 0; half /= 2) {
      const int mask = half * (kPieces / kNormLoads);
      const bool is_upper = (simt.lane() & mask) != 0;
      KEEPSET_UNROLL
      for (int j = 0; j < half; ++j) {
        const float kept = is_upper ? sums[j + half] : sums[j];
        const float given = is_upper ? sums[j] : sums[j + half];
        sums[j] = kept + simt.ShuffleXor(given, mask);
      }
    }
    KEEPSET_UNROLL
    for (int mask = kPieces / kNormLoads / 2; mask > 0; mask /= 2) {
      sums[0] += simt.ShuffleXor(sums[0], mask);
    }
    return sums[0];
  }

  DeviceRows v_;
  const ColumnSegment& segment_;
  std::byte* buffer_;
  float* norms_ = nullptr;
};

// The share of a block's tiles of the warps beside the loading one, which take tiles in turns.
template <DType kType, typename Simt>
KEEPSET_KERNEL_BODY inline void NormRange(const Simt& simt, const HopperParams& p,
                                          const TaskRange& range, std::byte* buffer) {
  for (int64_t task = range.begin; task < range.end;) {
    const ColumnSegment segment = FindSegment(p, task, range.end);
    task += segment.num_tiles;
    if (segment.part.is_first == 0 || p.window.layers[segment.at.layer].value_norms == nullptr) {
      continue;
    }
    NormStream<kType>(simt, p.window, segment, buffer).Run(simt, p.window);
  }
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_HOPPER_NORMS_INL_H_
