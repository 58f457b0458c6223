// What ops on tensors refuse because kernels count it in 32 bits or in a grid's dimension.
#ifndef KEEPSET_KERNELS_CUDA_OP_LIMITS_H_
#define KEEPSET_KERNELS_CUDA_OP_LIMITS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "kernels/views.h"

namespace keepset::kernels::cuda {

// Positions and rows are 32-bit in kernels, with room for a tile past the end; a fault's place,
// rows times positions, has 59 bits.
constexpr int64_t kMaxPositions = int64_t{1} << 29;
constexpr int64_t kMaxRows = int64_t{1} << 29;
// Row tiles and heads are counted by grid dimensions of 16 bits.
constexpr int64_t kMaxGroupRows = int64_t{1} << 20;
constexpr int64_t kMaxHeads = 65535;

inline absl::Status CheckLimit(int64_t value, int64_t limit, absl::string_view name,
                               absl::string_view what) {
  if (value <= limit) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what, ": ", name, "=", value, ", want at most ", limit, " on a GPU"));
}

inline absl::Status CheckKvLimits(const KvView& view, absl::string_view what) {
  KEEPSET_RETURN_IF_ERROR(CheckLimit(view.seq_len, kMaxPositions, "seq_len", what));
  KEEPSET_RETURN_IF_ERROR(CheckLimit(view.num_kv_heads, kMaxHeads, "num_kv_heads", what));
  return CheckLimit(view.head_dim, kMaxPositions, "head_dim", what);
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_OP_LIMITS_H_
