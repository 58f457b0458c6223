#include <algorithm>
#include <cmath>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cpu/element.h"
#include "kernels/cpu/norms_simd.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/row_pointers.h"
#include "kernels/op_checks.h"

namespace keepset::kernels::cpu {
namespace {

constexpr int64_t kRowsPerTask = 512;

// The norm of one row whose squares do not fit fp32, in fp64.
absl::StatusOr<float> CarefulNorm(const std::byte* row, int64_t head_dim, DType dtype) {
  if (FindNonFinite(row, head_dim, dtype) >= 0) {
    return absl::InvalidArgumentError("is not finite");
  }
  double sum = 0.0;
  for (int64_t c = 0; c < head_dim; ++c) {
    const double value = LoadElement(row, c, dtype);
    sum += value * value;
  }
  const float norm = static_cast<float>(std::sqrt(sum));
  if (!IsFinite(norm)) return absl::InvalidArgumentError("has a norm beyond fp32");
  return norm;
}

}  // namespace

absl::Status RowNorms(CpuContext& context, const KvView& x, absl::string_view what,
                      ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(CheckRowNorms(x, what, out));
  KEEPSET_RETURN_IF_ERROR(
      context.ReserveSlots(SlotScratch::kPointers, kRowsPerTask * int64_t{sizeof(void*)}));
  const int64_t tasks_per_head = (x.seq_len + kRowsPerTask - 1) / kRowsPerTask;
  return context.TryParallelFor(
      x.num_kv_heads * tasks_per_head, [&](int64_t task, int slot) -> absl::Status {
        const int64_t head = task / tasks_per_head;
        const int64_t begin = task % tasks_per_head * kRowsPerTask;
        const int64_t count = std::min(kRowsPerTask, x.seq_len - begin);
        const std::byte** rows = context.slot(slot, SlotScratch::kPointers).as<const std::byte*>();
        RowPointers(x, head, begin, count, rows);
        float* norms = out.data() + head * x.seq_len + begin;
        FastNorms(rows, count, x.head_dim, x.dtype, norms);
        for (int64_t i = 0; i < count; ++i) {
          if (IsFinite(norms[i])) continue;
          absl::StatusOr<float> norm = CarefulNorm(rows[i], x.head_dim, x.dtype);
          if (!norm.ok()) {
            return absl::InvalidArgumentError(absl::StrCat(
                what, ": head ", head, " position ", begin + i, " ", norm.status().message()));
          }
          norms[i] = *norm;
        }
        return absl::OkStatus();
      });
}

}  // namespace keepset::kernels::cpu
