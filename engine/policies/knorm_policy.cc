// knorm: keys of small norm stay (methods.md 4.13), per KV head.
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/policies/retention_policy.h"

namespace keepset::engine {
namespace {

class KnormPolicy final : public LayerwisePolicy {
 public:
  Requirements requirements() const override { return {.keys = true}; }

  int64_t score_rows(const PolicyContext& context) const override {
    return context.spec.model.num_kv_heads;
  }

  absl::Status Begin(PolicyContext& context) override {
    const int64_t num_kv_heads = context.spec.model.num_kv_heads;
    negative_.assign(num_kv_heads, -1.0f);
    KEEPSET_ASSIGN_OR_RETURN(norms_, context.backend.NewBuffer(num_kv_heads, context.spec.seq_len));
    return absl::OkStatus();
  }

  absl::Status ScoreLayer(PolicyContext& context, int64_t layer,
                          const LayerObservation& observation,
                          kernels::ScoreBuffer& scores) override {
    KEEPSET_RETURN_IF_ERROR(context.backend.RowNorms(
        context.op_context, observation.k, absl::StrCat("layer ", layer, ": k"), *norms_));
    return context.backend.MergeRows(context.op_context, *norms_, kernels::Merge::kSum, negative_,
                                     scores);
  }

 private:
  std::vector<float> negative_;                  // [Hkv]
  std::unique_ptr<kernels::ScoreBuffer> norms_;  // [Hkv, T]
};

}  // namespace

absl::StatusOr<std::unique_ptr<RetentionPolicy>> NewKnormPolicy(PolicyParameters& /*parameters*/) {
  return std::make_unique<KnormPolicy>();
}

}  // namespace keepset::engine
