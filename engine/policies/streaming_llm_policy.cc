// streaming_llm: the first n_sink positions and the most recent ones (methods.md 4.6).
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/status_macros.h"
#include "engine/policies/retention_policy.h"

namespace keepset::engine {
namespace {

class StreamingLlmPolicy final : public LayerwisePolicy {
 public:
  explicit StreamingLlmPolicy(int64_t n_sink) : n_sink_(n_sink) {}

  Requirements requirements() const override { return {}; }
  int64_t score_rows(const PolicyContext& /*context*/) const override { return 1; }

  absl::Status Begin(PolicyContext& context) override {
    // Sinks rank above everything, the lower the better, so that a budget below n_sink keeps
    // 0..n-1; the rest ranks by recency. Whole numbers below 2^24 in size, exact as fp32.
    const int64_t seq_len = context.spec.seq_len;
    const int64_t n_sink = std::min(n_sink_, seq_len);
    ranks_.resize(seq_len);
    for (int64_t t = 0; t < seq_len; ++t) {
      ranks_[t] = static_cast<float>(t < n_sink ? n_sink - t : t - seq_len);
    }
    return absl::OkStatus();
  }

  absl::Status ScoreLayer(PolicyContext& context, int64_t /*layer*/,
                          const LayerObservation& /*observation*/,
                          kernels::ScoreBuffer& scores) override {
    return context.backend.CopyFromHost(context.op_context, ranks_, scores);
  }

 private:
  const int64_t n_sink_;
  std::vector<float> ranks_;  // [T]
};

}  // namespace

absl::StatusOr<std::unique_ptr<RetentionPolicy>> NewStreamingLlmPolicy(
    PolicyParameters& parameters) {
  KEEPSET_ASSIGN_OR_RETURN(const int64_t n_sink, parameters.Int("n_sink", 4, 0, int64_t{1} << 24));
  return std::make_unique<StreamingLlmPolicy>(n_sink);
}

}  // namespace keepset::engine
