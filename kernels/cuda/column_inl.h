// A column of the result in the registers of a thread, as the kernels of both kinds check and join
// it.
#ifndef KEEPSET_KERNELS_CUDA_COLUMN_INL_H_
#define KEEPSET_KERNELS_CUDA_COLUMN_INL_H_

#include "kernels/cuda/host_device.h"

namespace keepset::kernels::cuda {

constexpr float kMostColumn = 8.507059173023462e37f;  // 2^126

// Remembers whether a logit of a token is not finite, or a column of it not a number or too large:
// then why is looked into (ReportColumn).
class ColumnCheck {
 public:
  // Of every row, whether it sees the token or not: a key that is not finite makes all logits so.
  KEEPSET_HD void SeeLogit(float logit) { check_ += logit * 0.0f; }
  // NaN, too, is not below the limit.
  KEEPSET_HD void SeeColumn(float column) {
    if (!(column < kMostColumn)) check_ = column - column + 1.0f;
  }
  KEEPSET_HD bool IsSuspect() const { return !(check_ == 0.0f); }
  KEEPSET_HD void Clear() { check_ = 0.0f; }

 private:
  float check_ = 0.0f;
};

// Joins kLanes neighbouring lanes of a warp that share a token. kLanes: a power of two; `simt` has
// Max and ShuffleXor.
template <int kLanes, typename Simt>
KEEPSET_HD inline float JoinLaneColumns(const Simt& simt, float column, bool is_max) {
  KEEPSET_UNROLL
  for (int mask = 1; mask < kLanes; mask *= 2) {
    const float other = simt.ShuffleXor(column, mask);
    column = is_max ? simt.Max(column, other) : column + other;
  }
  return column;
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_COLUMN_INL_H_
