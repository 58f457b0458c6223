// random: a seeded draw per layer, the floor that every informed policy has to beat.
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "base/status_macros.h"
#include "engine/policies/retention_policy.h"

namespace keepset::engine {
namespace {

// One step of splitmix64: integer arithmetic only, the same on every platform.
constexpr uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// Uniform in [0, 1) with 24 bits, exact as fp32.
float Draw(uint64_t seed, uint64_t layer, uint64_t position) {
  const uint64_t bits = Mix(Mix(Mix(seed) ^ layer) ^ position);
  return static_cast<float>(bits >> 40) * 0x1p-24f;
}

class RandomPolicy final : public LayerwisePolicy {
 public:
  explicit RandomPolicy(int64_t seed) : seed_(static_cast<uint64_t>(seed)) {}

  Requirements requirements() const override { return {}; }
  int64_t score_rows(const PolicyContext& /*context*/) const override { return 1; }

  absl::Status Begin(PolicyContext& context) override {
    draws_.resize(context.spec.seq_len);
    return absl::OkStatus();
  }

  absl::Status ScoreLayer(PolicyContext& context, int64_t layer,
                          const LayerObservation& /*observation*/,
                          kernels::ScoreBuffer& scores) override {
    for (size_t t = 0; t < draws_.size(); ++t) {
      draws_[t] = Draw(seed_, static_cast<uint64_t>(layer), t);
    }
    return context.backend.CopyFromHost(context.op_context, draws_, scores);
  }

 private:
  const uint64_t seed_;
  std::vector<float> draws_;  // [T]
};

}  // namespace

absl::StatusOr<std::unique_ptr<RetentionPolicy>> NewRandomPolicy(PolicyParameters& parameters) {
  KEEPSET_ASSIGN_OR_RETURN(const int64_t seed,
                           parameters.Int("seed", 0, 0, std::numeric_limits<int64_t>::max()));
  return std::make_unique<RandomPolicy>(seed);
}

}  // namespace keepset::engine
