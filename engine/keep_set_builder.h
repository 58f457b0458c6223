// From observations to keep sets: has the policy score, holds scores no longer than they are
// needed, and cuts each layer as soon as its scores are final.
#ifndef KEEPSET_ENGINE_KEEP_SET_BUILDER_H_
#define KEEPSET_ENGINE_KEEP_SET_BUILDER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "base/clock.h"
#include "engine/cut.h"
#include "engine/operation_plan.h"
#include "engine/operation_types.h"
#include "engine/policies/retention_policy.h"
#include "kernels/compute_backend.h"

namespace keepset::engine {

// Belongs to one operation, used by one thread. Borrows all it is made from.
class KeepSetBuilder {
 public:
  KeepSetBuilder(const OperationPlan& plan, kernels::ComputeBackend& backend, const Clock& clock);
  KeepSetBuilder(const KeepSetBuilder&) = delete;
  KeepSetBuilder& operator=(const KeepSetBuilder&) = delete;

  // Begins the policy. Once, before everything else.
  absl::Status Begin();

  // Layers come in ascending order, some in each call. A refused call leaves the builder as it was.
  absl::Status Score(absl::Span<const ObservedLayer> layers);

  // Completes what needs every layer. Works in place: after an error it cannot be repeated.
  absl::Status Finish();

  // The keep set of a layer, null as long as it is not final.
  const std::optional<LayerResult>& layer_result(int64_t layer) const {
    return layer_results_[layer];
  }

  // After Finish.
  std::vector<LayerResult> TakeLayerResults();

  // Frees all scores; only times() may be asked for afterwards.
  void Clear();

  // Score and select so far.
  const StageTimes& times() const { return times_; }

 private:
  RetentionPolicy& policy() const { return *plan_.policy; }
  int64_t num_layers() const { return plan_.spec.model.num_layers; }
  int64_t seq_len() const { return plan_.spec.seq_len; }
  bool is_sequence() const { return plan_.scope == Scope::kSequence; }
  bool is_shared() const { return policy().locality() == Locality::kShared; }

  using Buffers = std::vector<std::unique_ptr<kernels::ScoreBuffer>>;

  absl::Status ScoreAndWait(absl::Span<const ObservedLayer> layers,
                            absl::Span<kernels::ScoreBuffer* const> scores);
  absl::Status ScoreShared(absl::Span<const ObservedLayer> layers);
  absl::Status ScoreApart(absl::Span<const ObservedLayer> layers);
  absl::Status MergeIntoSequence(kernels::ScoreBuffer& scores);
  absl::Status CutNow(absl::Span<const ObservedLayer> layers, const Buffers& scores);
  absl::Status CutShared();
  absl::Status CutSequence();
  absl::Status CutTogether();
  void Annotate(int64_t layer, LayerResult& result) const;

  const OperationPlan& plan_;
  kernels::ComputeBackend& backend_;
  const Clock& clock_;
  PolicyContext context_;
  std::optional<Cutter> cutter_;
  std::vector<std::optional<LayerResult>> layer_results_;  // [L]
  // [L], null when not kept; one per group of layers when the policy shares scores.
  Buffers layer_scores_;
  Buffers spare_scores_;   // [score_rows, T] each
  Buffers merged_scores_;  // [1, T] each, null before their first use
  std::unique_ptr<kernels::ScoreBuffer> sequence_scores_;  // [1, T]
  StageTimes times_;
};

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_KEEP_SET_BUILDER_H_
