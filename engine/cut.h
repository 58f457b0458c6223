// From scores to keep sets: merging heads and layers for the scope, dilation, the cut.
#ifndef KEEPSET_ENGINE_CUT_H_
#define KEEPSET_ENGINE_CUT_H_

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/operation_types.h"
#include "engine/policies/policy_parameters.h"
#include "engine/policies/retention_policy.h"
#include "engine/protection.h"
#include "kernels/compute_backend.h"

namespace keepset::engine {

// How layer_equal of a threshold policy finds its common count.
enum class EqualCount { kMax, kMean };

// The stages every policy inherits. Read from the parameters that are the operation's, not the
// policy's.
struct CutOptions {
  int64_t dilate = 0;
  kernels::Merge head_merge = kernels::Merge::kMean;
  kernels::Merge layer_merge = kernels::Merge::kMean;
  EqualCount equal_count = EqualCount::kMax;
};

// `native_scope` decides whether the policy scores heads apart, so that head_merge means something.
absl::StatusOr<CutOptions> ReadCutOptions(PolicyParameters& parameters, Scope native_scope,
                                          const RetentionPolicy& policy);

// The cuts of one operation. Borrows backend and context; used by one thread.
class Cutter {
 public:
  struct Settings {
    Scope scope = Scope::kLayerEqual;
    CutOptions options;
    ScoreKind score_kind = ScoreKind::kRanking;
    int64_t seq_len = 0;
    int64_t num_layers = 0;
    int64_t num_kv_heads = 0;
    int64_t limit = 0;  // positions per set, clamped to seq_len
    int64_t min_kept = 1;
    PositionRanges protected_ranges;
    PositionRanges forced_ranges;
  };

  Cutter(Settings settings, kernels::ComputeBackend& backend, kernels::OpContext& op_context)
      : settings_(std::move(settings)), backend_(backend), op_context_(op_context) {}

  // Replaces the positions per set.
  void set_limit(int64_t limit) { settings_.limit = limit; }

  // Rows of a layer's scores when they are cut: KV heads in scope kv_head when the policy scores
  // them apart, else 1.
  int64_t CutRows(int64_t score_rows) const;

  // Whether the count of one layer needs no other layer, so that it can be cut at once.
  bool CutsLayersApart() const;

  // Merges heads as the scope asks. Returns `scores` itself or `merged` ([CutRows, T]), which is
  // made when it is needed and null.
  absl::StatusOr<kernels::ScoreBuffer*> MergeHeads(kernels::ScoreBuffer& scores,
                                                   std::unique_ptr<kernels::ScoreBuffer>& merged);

  // Adds one layer to the scores of scope sequence ([1, T], made when null).
  absl::Status MergeLayer(const kernels::ScoreBuffer& scores,
                          std::unique_ptr<kernels::ScoreBuffer>& sequence);

  // Dilates every layer's scores ([1 or num_kv_heads, T]) in place and cuts them at the full limit,
  // all at once.
  absl::StatusOr<std::vector<LayerResult>> CutLayers(absl::Span<kernels::ScoreBuffer* const> scores,
                                                     absl::Span<const float> taus);
  // The same of one layer.
  absl::StatusOr<LayerResult> CutLayer(kernels::ScoreBuffer& scores, float tau);

  // layer_equal of a threshold policy: one count for all layers, the largest or the mean of what
  // layer_elastic would keep. Dilates in place.
  absl::StatusOr<std::vector<LayerResult>> CutEqual(absl::Span<kernels::ScoreBuffer* const> scores,
                                                    absl::Span<const float> taus);

 private:
  absl::StatusOr<std::vector<LayerResult>> Cut(absl::Span<kernels::ScoreBuffer* const> scores,
                                               absl::Span<const float> taus, int64_t count,
                                               int64_t min_kept);

  Settings settings_;
  kernels::ComputeBackend& backend_;
  kernels::OpContext& op_context_;
};

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_CUT_H_
