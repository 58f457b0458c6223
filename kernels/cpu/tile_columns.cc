#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cpu/element.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/pack_simd.h"
#include "kernels/op_checks.h"

namespace keepset::kernels::cpu {
namespace {

constexpr int64_t kColumnsPerTask = 2048;

}  // namespace

absl::Status TileColumns(CpuContext& context, const TileArgs& args, ScoreBuffer& out) {
  const TileView& tile = args.tile;
  const std::string name = absl::StrCat(args.what, ": ", args.tensor);
  KEEPSET_RETURN_IF_ERROR(CheckTile(args, out));
  const std::vector<HeadRows> wanted =
      WantedRows(args.heads, args.reduction, tile.num_qo_heads, tile.num_rows);
  const auto num_outputs = static_cast<int64_t>(wanted.size());
  KEEPSET_RETURN_IF_ERROR(
      context.ReserveSlots(SlotScratch::kLogits, kColumnsPerTask * int64_t{sizeof(float)}));
  const int64_t tasks_per_head = (tile.seq_len + kColumnsPerTask - 1) / kColumnsPerTask;
  return context.TryParallelFor(
      num_outputs * tasks_per_head, [&](int64_t task, int slot) -> absl::Status {
        const HeadRows& output = wanted[task / tasks_per_head];
        const int64_t head = output.head;
        const int64_t begin = task % tasks_per_head * kColumnsPerTask;
        const int64_t count = std::min(kColumnsPerTask, tile.seq_len - begin);
        float* acc = out.data() + task / tasks_per_head * tile.seq_len + begin;
        std::fill(acc, acc + count, 0.0f);
        float* row = context.slot(slot, SlotScratch::kLogits).as<float>();
        for (int64_t i = output.first_row; i < output.first_row + output.num_rows; ++i) {
          const int64_t visible = std::clamp<int64_t>(args.row_positions[i] + 1 - begin, 0, count);
          Widen(tile.data + (head * tile.head_stride + i * tile.row_stride + begin) *
                                DTypeBytes(tile.dtype),
                visible, tile.dtype, row);
          // False for NaN, too; infinities fail at 0 * inf.
          float check = 0.0f;
          bool is_negative = false;
          for (int64_t t = 0; t < visible; ++t) {
            check += row[t] * 0.0f;
            is_negative |= row[t] < 0.0f;
          }
          if (is_negative || !(check == 0.0f)) {
            int64_t t = 0;
            while (row[t] >= 0.0f && IsFinite(row[t])) ++t;
            return absl::InvalidArgumentError(
                absl::StrCat(TileRowName(name, tile.num_rows, head, i), " position ", begin + t,
                             " is ", row[t], ", want finite and >= 0"));
          }
          if (output.reduction == RowReduction::kMax) {
            for (int64_t t = 0; t < visible; ++t) acc[t] = std::max(acc[t], row[t]);
          } else {
            for (int64_t t = 0; t < visible; ++t) acc[t] += row[t];
          }
        }
        float check = 0.0f;
        for (int64_t t = 0; t < count; ++t) check += acc[t] * 0.0f;
        if (!(check == 0.0f)) {
          return absl::InvalidArgumentError(
              absl::StrCat(name, ": head ", head, " columns sum beyond fp32"));
        }
        if (output.reduction == RowReduction::kMean) {
          const float divisor = static_cast<float>(MeanRows(args, output));
          for (int64_t t = 0; t < count; ++t) acc[t] /= divisor;
        }
        return absl::OkStatus();
      });
}

}  // namespace keepset::kernels::cpu
