// full: every position stays. The reference point of every comparison.
#include <memory>

#include "engine/policies/retention_policy.h"

namespace keepset::engine {
namespace {

class FullPolicy final : public LayerwisePolicy {
 public:
  Requirements requirements() const override { return {}; }
  bool keeps_everything() const override { return true; }
  int64_t score_rows(const PolicyContext& /*context*/) const override { return 1; }
  absl::Status Begin(PolicyContext& /*context*/) override { return absl::OkStatus(); }

  absl::Status ScoreLayer(PolicyContext& /*context*/, int64_t /*layer*/,
                          const LayerObservation& /*observation*/,
                          kernels::ScoreBuffer& /*scores*/) override {
    return absl::OkStatus();
  }
};

}  // namespace

absl::StatusOr<std::unique_ptr<RetentionPolicy>> NewFullPolicy(PolicyParameters& /*parameters*/) {
  return std::make_unique<FullPolicy>();
}

}  // namespace keepset::engine
