// tova: attention of the last observed row, mean over all query heads (methods.md 4.7).
#include <cstddef>
#include <memory>
#include <vector>

#include "base/status_macros.h"
#include "engine/policies/retention_policy.h"
#include "engine/policies/window_columns.h"

namespace keepset::engine {
namespace {

class TovaPolicy final : public RetentionPolicy {
 public:
  Requirements requirements() const override {
    return {.observation = true, .columns = true, .max_rows = 1};
  }
  int64_t score_rows(const PolicyContext& /*context*/) const override { return 1; }

  absl::Status Begin(PolicyContext& context) override {
    return window_.Begin(context, /*num_rows=*/1, WindowStage::ValueNorms::kNone);
  }

  absl::Status Score(PolicyContext& context, absl::Span<const ObservedLayer> layers,
                     absl::Span<kernels::ScoreBuffer* const> scores) override {
    KEEPSET_RETURN_IF_ERROR(window_.Run(context, layers));
    for (size_t i = 0; i < layers.size(); ++i) {
      KEEPSET_RETURN_IF_ERROR(context.backend.MergeRows(context.op_context, window_.columns(i),
                                                        kernels::Merge::kMean, {}, *scores[i]));
    }
    return absl::OkStatus();
  }

  std::vector<kernels::SelectArgs::Range> ForcedRanges(
      const PolicyContext& context) const override {
    return {{context.spec.seq_len - 1, context.spec.seq_len}};
  }

 private:
  WindowStage window_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<RetentionPolicy>> NewTovaPolicy(PolicyParameters& /*parameters*/) {
  return std::make_unique<TovaPolicy>();
}

}  // namespace keepset::engine
