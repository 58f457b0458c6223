// Norms of rows of K or V by one warp; shared by the op RowNorms and by the window scores, whose
// last pass carries the value norms along.
#ifndef KEEPSET_KERNELS_CUDA_ROW_NORM_INL_H_
#define KEEPSET_KERNELS_CUDA_ROW_NORM_INL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device_rows.h"
#include "kernels/cuda/element.h"
#include "kernels/cuda/fault_code.h"
#include "kernels/cuda/host_device.h"

namespace keepset::kernels::cuda {

// Sixteen bytes of a row.
struct alignas(16) Piece {
  uint32_t words[4];
};

KEEPSET_HD inline int64_t PiecesPerRow(const DeviceRows& rows) {
  return rows.head_dim * DTypeBytes(rows.dtype) / 16;
}

// Whether every row begins at a multiple of 16 bytes and consists of whole pieces.
template <typename Byte>
KEEPSET_HD inline bool HasAlignedRows(const BasicDeviceRows<Byte>& rows) {
  const int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.data)) |
                      rows.head_bytes | rows.token_bytes | rows.block_bytes |
                      (rows.head_dim * DTypeBytes(rows.dtype));
  return (all & 15) == 0;
}

template <typename Sum>
KEEPSET_HD inline Sum SumOfSquares(const Piece& piece, DType dtype) {
  Sum sum = 0;
  KEEPSET_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = piece.words[i];
    if (dtype == DType::kF32) {
      const Sum x = static_cast<Sum>(FloatOfBits(word));
      sum += x * x;
      continue;
    }
    const bool is_half = dtype == DType::kF16;
    const auto low_bits = static_cast<uint16_t>(word & 0xffffu);
    const auto high_bits = static_cast<uint16_t>(word >> 16);
    const Sum low =
        static_cast<Sum>(is_half ? HalfBitsToFloat(low_bits) : BfloatBitsToFloat(low_bits));
    const Sum high =
        static_cast<Sum>(is_half ? HalfBitsToFloat(high_bits) : BfloatBitsToFloat(high_bits));
    sum += low * low;
    sum += high * high;
  }
  return sum;
}

// This lane's share of the squares of a row: pieces or elements sub, sub + step, ...
template <typename Sum>
KEEPSET_HD inline Sum PartOfSquares(const std::byte* row, const DeviceRows& rows, bool is_aligned,
                                    int sub, int step) {
  Sum sum = 0;
  if (is_aligned) {
    const auto* pieces = reinterpret_cast<const Piece*>(row);
    const auto count = static_cast<int>(PiecesPerRow(rows));
    for (int i = sub; i < count; i += step) sum += SumOfSquares<Sum>(pieces[i], rows.dtype);
  } else {
    for (int i = sub; i < rows.head_dim; i += step) {
      const Sum x = static_cast<Sum>(LoadElement(row, i, rows.dtype));
      sum += x * x;
    }
  }
  return sum;
}

// Whether a sum of squares is right in fp32: it is finite, and squares below the normal numbers do
// not matter beside it, with the CPU's bound. Squares of a row of zeros are taken for lost ones.
KEEPSET_HD inline bool HoldsSquares(float sum) { return sum >= 0x1p-90f && IsFiniteValue(sum); }

// out[i] = norm of row (head, begin + i), i in [0, count), by one warp with all its lanes.
// first_place: place of the first row in a fault.
template <typename Simt>
KEEPSET_KERNEL_BODY inline void WarpRowNorms(const Simt& simt, const DeviceRows& rows, int head,
                                             int begin, int count, int64_t first_place, float* out,
                                             uint64_t* fault) {
  const bool is_aligned = HasAlignedRows(rows);
  const int64_t parts = is_aligned ? PiecesPerRow(rows) : rows.head_dim;
  int lanes_per_row = 1;
  while (lanes_per_row < parts && lanes_per_row < 32) lanes_per_row *= 2;
  const int rows_at_once = 32 / lanes_per_row;
  const int sub = simt.lane() & (lanes_per_row - 1);
  for (int first = 0; first < count; first += rows_at_once) {
    const int i = first + simt.lane() / lanes_per_row;
    const std::byte* row = i < count ? rows.Row(head, begin + i) : nullptr;
    float sum = 0.0f;
    if (row != nullptr) sum = PartOfSquares<float>(row, rows, is_aligned, sub, lanes_per_row);
    for (int mask = lanes_per_row / 2; mask > 0; mask /= 2) sum += simt.ShuffleXor(sum, mask);
    float norm = simt.Sqrt(sum);
    // Squares that do not fit fp32 are summed again in fp64. The whole warp takes part.
    const bool is_careful = row != nullptr && !HoldsSquares(sum);
    if (simt.Ballot(is_careful) != 0) {
      double careful = 0.0;
      if (row != nullptr) {
        careful = PartOfSquares<double>(row, rows, is_aligned, sub, lanes_per_row);
      }
      for (int mask = lanes_per_row / 2; mask > 0; mask /= 2) {
        careful += simt.ShuffleXor(careful, mask);
      }
      if (is_careful && sub == 0) {
        norm = static_cast<float>(simt.Sqrt(careful));
        if (!IsFiniteValue(norm)) {
          // Squares of fp32 values sum to a finite fp64 number.
          const bool is_finite = careful - careful == 0.0;
          simt.MinGlobal(fault,
                         FaultCode(is_finite ? FaultKind::kNormTooLarge : FaultKind::kNormInput,
                                   first_place + i));
        }
      }
    }
    if (row != nullptr && sub == 0) out[i] = norm;
  }
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_ROW_NORM_INL_H_
