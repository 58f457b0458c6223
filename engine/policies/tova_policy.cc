// tova: attention of the last observed row, mean over all query heads (methods.md 4.7).
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
    KEEPSET_ASSIGN_OR_RETURN(
        columns_, context.backend.NewBuffer(context.spec.model.num_qo_heads, context.spec.seq_len));
    return absl::OkStatus();
  }

  absl::Status Score(PolicyContext& context, int64_t layer, const LayerObservation& observation,
                     kernels::ScoreBuffer& scores) override {
    KEEPSET_RETURN_IF_ERROR(
        WindowColumnMeans(context, layer, observation, /*num_rows=*/1, *columns_));
    return context.backend.MergeRows(context.op_context, *columns_, kernels::Merge::kMean, {},
                                     scores);
  }

  std::vector<kernels::SelectArgs::Range> ForcedRanges(
      const PolicyContext& context) const override {
    return {{context.spec.seq_len - 1, context.spec.seq_len}};
  }

 private:
  std::unique_ptr<kernels::ScoreBuffer> columns_;  // [H, T]
};

}  // namespace

absl::StatusOr<std::unique_ptr<RetentionPolicy>> NewTovaPolicy(PolicyParameters& /*parameters*/) {
  return std::make_unique<TovaPolicy>();
}

}  // namespace keepset::engine
