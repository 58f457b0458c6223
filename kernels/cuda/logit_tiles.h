// How a block of threads shares a tile of logits a[i].b[j]: which thread holds which of them, and
// how they are computed. Two tiles: tensor cores for 16-bit operands, fused multiply-adds for every
// type and head dimension.
//
// A thread holds kRows x kColumns logits. The lanes of a warp that hold the same rows differ in the
// lowest bits, so a reduction over columns ends with shuffles over masks 1 .. kLanesPerRow / 2.
#ifndef KEEPSET_KERNELS_CUDA_LOGIT_TILES_H_
#define KEEPSET_KERNELS_CUDA_LOGIT_TILES_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/host_device.h"
#include "kernels/views.h"

namespace keepset::kernels::cuda {

// Columns of every tile: B rows that are in shared memory at a time.
constexpr int kTileColumns = 64;

// m16n8k16 tensor core products. A warp has 32 rows of A and all 64 of B.
template <DType kType>
struct MmaTile {
  static constexpr int kRowsPerWarp = 32;
  static constexpr int kRows = 4;
  static constexpr int kColumns = 16;
  static constexpr int kLanesPerRow = 4;

  // Row of A within the block's tile, of r in [0, kRows).
  KEEPSET_HD static int Row(int thread, int r) {
    const int lane = thread & 31;
    return (thread >> 5) * kRowsPerWarp + (lane >> 2) + 8 * (r & 1) + 16 * (r >> 1);
  }
  // Row of B of c in [0, kColumns).
  KEEPSET_HD static int Column(int thread, int c) {
    return (c >> 1) * 8 + (thread & 3) * 2 + (c & 1);
  }
  // Whether any column of index c lies below `count`, for every thread alike.
  KEEPSET_HD static bool IsUsed(int c, int count) { return (c >> 1) * 8 < count; }

  // Rows in shared memory start 16 bytes past a multiple of 32: eight rows of a matrix then lie in
  // different banks.
  KEEPSET_HD static int PitchBytes(int padded_dim) { return padded_dim * 2 + 16; }

  // logits = a b^T. a_rows: this warp's 32 rows, b_rows: 64 rows, padded_dim 16-bit elements each,
  // `pitch` bytes apart. Columns from `used_columns` rounded up to 16 on are left 0.
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Compute(const Simt& simt, const std::byte* a_rows,
                                          const std::byte* b_rows, int pitch, int padded_dim,
                                          int used_columns, float (&logits)[kRows][kColumns]) {
    const int lane = simt.lane();
    // Matrices 0..3 of A: rows 0-7 and 8-15 of the left half, then of the right half.
    const std::byte* a_lane = a_rows + (lane & 15) * pitch + (lane >> 4) * 16;
    // Matrices 0..3 of B: left and right half of rows 0-7, then of rows 8-15.
    const std::byte* b_lane =
        b_rows + ((lane & 7) + (lane >> 4) * 8) * pitch + ((lane >> 3) & 1) * 16;
    KEEPSET_UNROLL
    for (int r = 0; r < kRows; ++r) {
      KEEPSET_UNROLL
      for (int c = 0; c < kColumns; ++c) logits[r][c] = 0.0f;
    }
    // Unrolled, a thread needs more registers than two blocks of 256 threads leave it.
    KEEPSET_NO_UNROLL
    for (int step_bytes = 0; step_bytes < padded_dim * 2; step_bytes += 32) {
      uint32_t a[2][4];
      simt.LoadMatrix4(a[0], a_lane + step_bytes);
      simt.LoadMatrix4(a[1], a_lane + 16 * pitch + step_bytes);
      KEEPSET_UNROLL
      for (int pair = 0; pair < 4; ++pair) {
        if (pair * 16 >= used_columns) continue;
        uint32_t b[4];
        simt.LoadMatrix4(b, b_lane + pair * 16 * pitch + step_bytes);
        KEEPSET_UNROLL
        for (int m = 0; m < 2; ++m) {
          KEEPSET_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int c = 4 * pair + 2 * half;
            simt.template Mma<kType>(logits[2 * m][c], logits[2 * m][c + 1], logits[2 * m + 1][c],
                                     logits[2 * m + 1][c + 1], a[m], b[2 * half], b[2 * half + 1]);
          }
        }
      }
    }
  }
};

// Fused multiply-adds on widened elements. 256 threads have 64 rows of A and 64 of B; operands pass
// through shared memory in steps of kStep channels.
struct FmaTile {
  static constexpr int kThreads = 256;
  static constexpr int kTileRows = 64;
  static constexpr int kRows = 4;
  static constexpr int kColumns = 4;
  static constexpr int kLanesPerRow = 16;
  static constexpr int kStep = 32;
  static constexpr int kPitch = kStep + 1;  // floats; odd, so that columns lie in different banks
  static constexpr int64_t kSharedBytes = int64_t{2} * kTileRows * kPitch * 4;

  KEEPSET_HD static int Row(int thread, int r) { return (thread >> 4) * kRows + r; }
  KEEPSET_HD static int Column(int thread, int c) { return (thread & 15) + 16 * c; }
  KEEPSET_HD static bool IsUsed(int c, int count) { return 16 * c < count; }

  // One operand: row(i) points at row i, or is null where it is zero.
  template <typename Simt, typename RowPointer>
  KEEPSET_KERNEL_BODY static void Load(const Simt& simt, float* to, int begin, int head_dim,
                                       DType dtype, RowPointer row) {
    for (int i = simt.warp(); i < kTileRows; i += kThreads / 32) {
      const std::byte* from = row(i);
      const int channel = begin + simt.lane();
      to[i * kPitch + simt.lane()] =
          from != nullptr && channel < head_dim ? LoadElement(from, channel, dtype) : 0.0f;
    }
  }

  // logits = a b^T. shared: kSharedBytes. Begins and ends with the block in step.
  template <typename Simt, typename ARow, typename BRow>
  KEEPSET_KERNEL_BODY static void Compute(const Simt& simt, float* shared, int head_dim,
                                          DType a_dtype, ARow a_row, DType b_dtype, BRow b_row,
                                          float (&logits)[kRows][kColumns]) {
    float* a = shared;
    float* b = shared + kTileRows * kPitch;
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) logits[r][c] = 0.0f;
    }
    for (int begin = 0; begin < head_dim; begin += kStep) {
      simt.SyncBlock();
      Load(simt, a, begin, head_dim, a_dtype, a_row);
      Load(simt, b, begin, head_dim, b_dtype, b_row);
      simt.SyncBlock();
      for (int k = 0; k < kStep; ++k) {
        float x[kRows];
        float y[kColumns];
        KEEPSET_UNROLL
        for (int r = 0; r < kRows; ++r) x[r] = a[Row(simt.thread(), r) * kPitch + k];
        KEEPSET_UNROLL
        for (int c = 0; c < kColumns; ++c) y[c] = b[Column(simt.thread(), c) * kPitch + k];
        KEEPSET_UNROLL
        for (int r = 0; r < kRows; ++r) {
          KEEPSET_UNROLL
          for (int c = 0; c < kColumns; ++c) logits[r][c] += x[r] * y[c];
        }
      }
    }
    simt.SyncBlock();
  }
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_LOGIT_TILES_H_
