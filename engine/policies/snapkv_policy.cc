// snapkv: mean attention of the observed rows, average-pooled along the prompt, mean over the
// query heads of a KV head; the observed positions themselves stay (methods.md 4.1).
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/policies/retention_policy.h"
#include "engine/policies/window_columns.h"

namespace keepset::engine {
namespace {

class SnapKvPolicy final : public RetentionPolicy {
 public:
  explicit SnapKvPolicy(int64_t kernel_size) : kernel_size_(kernel_size) {}

  Requirements requirements() const override { return {.observation = true, .columns = true}; }

  int64_t score_rows(const PolicyContext& context) const override {
    return context.spec.model.num_kv_heads;
  }

  absl::Status Begin(PolicyContext& context) override {
    return window_.Begin(context, static_cast<int64_t>(context.row_positions.size()),
                         WindowStage::ValueNorms::kNone);
  }

  absl::Status Score(PolicyContext& context, absl::Span<const ObservedLayer> layers,
                     absl::Span<kernels::ScoreBuffer* const> scores) override {
    KEEPSET_RETURN_IF_ERROR(window_.Run(context, layers));
    for (size_t i = 0; i < layers.size(); ++i) {
      KEEPSET_RETURN_IF_ERROR(PoolAndMerge(context, window_.columns(i), *scores[i]));
    }
    return absl::OkStatus();
  }

  // The observed positions, as runs.
  std::vector<kernels::SelectArgs::Range> ForcedRanges(
      const PolicyContext& context) const override {
    std::vector<kernels::SelectArgs::Range> ranges;
    for (const int64_t position : context.row_positions) {
      if (!ranges.empty() && ranges.back().end == position) {
        ++ranges.back().end;
      } else {
        ranges.push_back({position, position + 1});
      }
    }
    return ranges;
  }

 private:
  absl::Status PoolAndMerge(PolicyContext& context, kernels::ScoreBuffer& columns,
                            kernels::ScoreBuffer& scores) const {
    // Zeroed columns under a zero-padded average pool give the values of the recipe, which drops
    // them: both add zeros and divide by the kernel.
    for (const kernels::SelectArgs::Range& range : ForcedRanges(context)) {
      KEEPSET_RETURN_IF_ERROR(
          context.backend.Fill(context.op_context, range.begin, range.end, 0.0f, columns));
    }
    KEEPSET_RETURN_IF_ERROR(context.backend.Pool(context.op_context, kernels::PoolKind::kAverage,
                                                 kernel_size_, context.spec.seq_len, columns));
    return context.backend.MergeRows(context.op_context, columns, kernels::Merge::kMean, {},
                                     scores);
  }

  const int64_t kernel_size_;
  WindowStage window_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<RetentionPolicy>> NewSnapKvPolicy(PolicyParameters& parameters) {
  KEEPSET_ASSIGN_OR_RETURN(
      const int64_t kernel_size,
      parameters.Int("kernel_size", 5, 1, std::numeric_limits<int32_t>::max()));
  if (kernel_size % 2 == 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "policy snapkv: parameter kernel_size=", kernel_size, ", want an odd integer"));
  }
  return std::make_unique<SnapKvPolicy>(kernel_size);
}

}  // namespace keepset::engine
