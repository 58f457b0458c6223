#include "engine/cut.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/status_macros.h"

namespace keepset::engine {
namespace {

absl::StatusOr<kernels::Merge> ReadMerge(PolicyParameters& parameters, absl::string_view name) {
  KEEPSET_ASSIGN_OR_RETURN(const std::string merge,
                           parameters.Choice(name, {"mean", "max", "sum"}));
  if (merge == "max") return kernels::Merge::kMax;
  return merge == "sum" ? kernels::Merge::kSum : kernels::Merge::kMean;
}

}  // namespace

absl::StatusOr<CutOptions> ReadCutOptions(PolicyParameters& parameters, Scope native_scope,
                                          const RetentionPolicy& policy) {
  CutOptions options;
  if (policy.keeps_everything()) return options;
  KEEPSET_ASSIGN_OR_RETURN(options.dilate, parameters.Int("dilate", 0, 0, int64_t{1} << 24));
  KEEPSET_ASSIGN_OR_RETURN(options.layer_merge, ReadMerge(parameters, "layer_merge"));
  if (native_scope == Scope::kKvHead) {
    KEEPSET_ASSIGN_OR_RETURN(options.head_merge, ReadMerge(parameters, "head_merge"));
  }
  if (policy.score_kind() == ScoreKind::kThreshold) {
    KEEPSET_ASSIGN_OR_RETURN(const std::string equal_count,
                             parameters.Choice("equal_count", {"max", "mean"}));
    options.equal_count =
        absl::string_view(equal_count) == "mean" ? EqualCount::kMean : EqualCount::kMax;
  }
  return options;
}

int64_t Cutter::CutRows(int64_t score_rows) const {
  return settings_.scope == Scope::kKvHead ? score_rows : 1;
}

bool Cutter::CutsLayersApart() const {
  switch (settings_.scope) {
    case Scope::kLayerElastic:
    case Scope::kKvHead:
      return true;
    case Scope::kLayerEqual:
      return settings_.score_kind == ScoreKind::kRanking;
    case Scope::kSequence:
      return false;
  }
  return false;
}

absl::StatusOr<kernels::ScoreBuffer*> Cutter::MergeHeads(
    kernels::ScoreBuffer& scores, std::unique_ptr<kernels::ScoreBuffer>& merged) {
  const int64_t rows = CutRows(scores.rows());
  if (rows == scores.rows()) return &scores;
  if (merged == nullptr) {
    KEEPSET_ASSIGN_OR_RETURN(merged, backend_.NewBuffer(rows, settings_.seq_len));
  }
  KEEPSET_RETURN_IF_ERROR(
      backend_.MergeRows(op_context_, scores, settings_.options.head_merge, {}, *merged));
  return merged.get();
}

absl::Status Cutter::MergeLayer(const kernels::ScoreBuffer& scores,
                                std::unique_ptr<kernels::ScoreBuffer>& sequence) {
  const kernels::Merge merge = settings_.options.layer_merge;
  if (sequence == nullptr) {
    KEEPSET_ASSIGN_OR_RETURN(sequence, backend_.NewBuffer(1, settings_.seq_len));
    if (merge == kernels::Merge::kMax) {
      KEEPSET_RETURN_IF_ERROR(backend_.Fill(op_context_, 0, settings_.seq_len,
                                            std::numeric_limits<float>::lowest(), *sequence));
    }
  }
  const float weight =
      merge == kernels::Merge::kMean ? 1.0f / static_cast<float>(settings_.num_layers) : 1.0f;
  return backend_.Accumulate(op_context_, scores, merge, weight, *sequence);
}

absl::StatusOr<std::vector<LayerResult>> Cutter::Cut(absl::Span<kernels::ScoreBuffer* const> scores,
                                                     absl::Span<const float> taus, int64_t count,
                                                     int64_t min_kept) {
  const PositionRanges ranges =
      AddForcedRanges(settings_.protected_ranges, settings_.forced_ranges, count);
  std::vector<kernels::SelectArgs> args(scores.size());
  std::vector<kernels::SelectTask> tasks;
  for (size_t layer = 0; layer < scores.size(); ++layer) {
    args[layer].protected_ranges = ranges;
    args[layer].budget = count;
    args[layer].threshold = taus[layer];
    args[layer].min_kept = std::min(min_kept, count);
    tasks.push_back({scores[layer], absl::MakeConstSpan(&args[layer], 1)});
  }
  KEEPSET_ASSIGN_OR_RETURN(std::vector<std::vector<kernels::Selection>> cuts,
                           backend_.SelectEach(op_context_, tasks));
  std::vector<LayerResult> results(scores.size());
  for (size_t layer = 0; layer < scores.size(); ++layer) {
    std::vector<kernels::Selection>& selections = cuts[layer];
    // Heads that share one score share one set, listed once per head in scope kv_head.
    if (settings_.scope == Scope::kKvHead && selections.size() == 1) {
      selections.resize(settings_.num_kv_heads, selections.front());
    }
    LayerResult& result = results[layer];
    for (kernels::Selection& selection : selections) {
      result.keep_indices.push_back(std::move(selection.keep_indices));
      result.candidates.push_back(selection.candidates);
      result.filled.push_back(selection.filled);
    }
    if (settings_.score_kind == ScoreKind::kThreshold) result.tau = taus[layer];
  }
  return results;
}

absl::StatusOr<std::vector<LayerResult>> Cutter::CutLayers(
    absl::Span<kernels::ScoreBuffer* const> scores, absl::Span<const float> taus) {
  if (settings_.options.dilate > 0) {
    for (kernels::ScoreBuffer* const layer : scores) {
      KEEPSET_RETURN_IF_ERROR(
          backend_.DilateForward(op_context_, settings_.options.dilate, *layer));
    }
  }
  return Cut(scores, taus, settings_.limit, settings_.min_kept);
}

absl::StatusOr<LayerResult> Cutter::CutLayer(kernels::ScoreBuffer& scores, float tau) {
  kernels::ScoreBuffer* const layers[] = {&scores};
  KEEPSET_ASSIGN_OR_RETURN(std::vector<LayerResult> results,
                           CutLayers(layers, absl::MakeConstSpan(&tau, 1)));
  return std::move(results.front());
}

absl::StatusOr<std::vector<LayerResult>> Cutter::CutEqual(
    absl::Span<kernels::ScoreBuffer* const> scores, absl::Span<const float> taus) {
  // What a layer keeps on its own, protected positions included: without them the common count
  // would push out what the gate of the fullest layer kept.
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<LayerResult> elastic, CutLayers(scores, taus));
  int64_t largest = 0;
  int64_t total = 0;
  for (const LayerResult& layer : elastic) {
    const auto kept = static_cast<int64_t>(layer.keep_indices.front().size());
    largest = std::max(largest, kept);
    total += kept;
  }
  const int64_t count = settings_.options.equal_count == EqualCount::kMax
                            ? largest
                            : total / static_cast<int64_t>(scores.size());
  return Cut(scores, taus, count, count);
}

}  // namespace keepset::engine
