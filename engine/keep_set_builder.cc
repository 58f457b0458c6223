#include "engine/keep_set_builder.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"
#include "engine/protection.h"

namespace keepset::engine {

KeepSetBuilder::KeepSetBuilder(const OperationPlan& plan, kernels::ComputeBackend& backend,
                               const Clock& clock)
    : plan_(plan),
      backend_(backend),
      clock_(clock),
      context_{plan.spec,
               backend,
               *plan.op_context,
               plan.scope,
               plan.budget_tokens,
               plan.row_positions,
               plan.ppl,
               plan.protected_ranges,
               plan.cut_options.dilate} {}

absl::Status KeepSetBuilder::Begin() {
  KEEPSET_RETURN_IF_ERROR(policy().Begin(context_));
  Cutter::Settings settings;
  settings.scope = plan_.scope;
  settings.options = plan_.cut_options;
  settings.score_kind = policy().score_kind();
  settings.seq_len = seq_len();
  settings.num_layers = num_layers();
  settings.num_kv_heads = plan_.spec.model.num_kv_heads;
  settings.limit = std::min(plan_.budget_tokens, seq_len());
  settings.min_kept = policy().min_kept();
  settings.protected_ranges = plan_.protected_ranges;
  settings.forced_ranges = JoinRanges(policy().ForcedRanges(context_));
  cutter_.emplace(std::move(settings), backend_, *plan_.op_context);
  layer_results_.resize(num_layers());
  layer_scores_.resize(is_shared() ? policy().num_layer_groups() : num_layers());
  return absl::OkStatus();
}

absl::Status KeepSetBuilder::Score(absl::Span<const ObservedLayer> layers) {
  const absl::Duration start = clock_.Monotonic();
  KEEPSET_RETURN_IF_ERROR(is_shared() ? ScoreShared(layers) : ScoreApart(layers));
  times_.score += clock_.Monotonic() - start;
  return absl::OkStatus();
}

absl::Status KeepSetBuilder::ScoreAndWait(absl::Span<const ObservedLayer> layers,
                                          absl::Span<kernels::ScoreBuffer* const> scores) {
  const absl::Status scored = policy().Score(context_, layers, scores);
  // The views end with the call, also when an op is refused after others were queued, and refused
  // layers must not leave traces. What the wait finds is older.
  KEEPSET_RETURN_IF_ERROR(backend_.Wait(*plan_.op_context));
  KEEPSET_RETURN_IF_ERROR(scored);
  return policy().Commit(context_, layers, scores);
}

absl::Status KeepSetBuilder::ScoreShared(absl::Span<const ObservedLayer> layers) {
  std::vector<kernels::ScoreBuffer*> outs;
  for (const ObservedLayer& layer : layers) {
    std::unique_ptr<kernels::ScoreBuffer>& scores = layer_scores_[policy().LayerGroup(layer.layer)];
    if (scores == nullptr) {
      KEEPSET_ASSIGN_OR_RETURN(scores, backend_.NewBuffer(1, seq_len()));
    }
    outs.push_back(scores.get());
  }
  return ScoreAndWait(layers, outs);
}

absl::Status KeepSetBuilder::ScoreApart(absl::Span<const ObservedLayer> layers) {
  // Scores that are cut or merged at once pass through the same buffers.
  const bool keep_scores =
      policy().locality() == Locality::kGlobal || (!cutter_->CutsLayersApart() && !is_sequence());
  Buffers fresh = keep_scores ? Buffers() : std::move(spare_scores_);
  while (fresh.size() < layers.size()) {
    KEEPSET_ASSIGN_OR_RETURN(std::unique_ptr<kernels::ScoreBuffer> buffer,
                             backend_.NewBuffer(policy().score_rows(context_), seq_len()));
    fresh.push_back(std::move(buffer));
  }
  std::vector<kernels::ScoreBuffer*> outs;
  for (size_t i = 0; i < layers.size(); ++i) outs.push_back(fresh[i].get());
  KEEPSET_RETURN_IF_ERROR(ScoreAndWait(layers, outs));
  if (keep_scores) {
    for (size_t i = 0; i < layers.size(); ++i) layer_scores_[layers[i].layer] = std::move(fresh[i]);
    return absl::OkStatus();
  }
  if (is_sequence()) {
    for (kernels::ScoreBuffer* const scores : outs) {
      KEEPSET_RETURN_IF_ERROR(MergeIntoSequence(*scores));
    }
  } else {
    KEEPSET_RETURN_IF_ERROR(CutNow(layers, fresh));
  }
  spare_scores_ = std::move(fresh);
  return absl::OkStatus();
}

// One layer whose scores are final.
absl::Status KeepSetBuilder::MergeIntoSequence(kernels::ScoreBuffer& scores) {
  if (merged_scores_.empty()) merged_scores_.resize(1);
  KEEPSET_ASSIGN_OR_RETURN(kernels::ScoreBuffer* const merged,
                           cutter_->MergeHeads(scores, merged_scores_.front()));
  return cutter_->MergeLayer(*merged, sequence_scores_);
}

// Layers whose scores are final, to their keep sets. `scores` begins with theirs.
absl::Status KeepSetBuilder::CutNow(absl::Span<const ObservedLayer> layers, const Buffers& scores) {
  const absl::Duration start = clock_.Monotonic();
  if (merged_scores_.size() < layers.size()) merged_scores_.resize(layers.size());
  std::vector<kernels::ScoreBuffer*> merged;
  std::vector<float> taus;
  for (size_t i = 0; i < layers.size(); ++i) {
    KEEPSET_ASSIGN_OR_RETURN(kernels::ScoreBuffer* const one,
                             cutter_->MergeHeads(*scores[i], merged_scores_[i]));
    merged.push_back(one);
    taus.push_back(policy().Verdict(layers[i].layer).tau);
  }
  KEEPSET_ASSIGN_OR_RETURN(std::vector<LayerResult> results, cutter_->CutLayers(merged, taus));
  for (size_t i = 0; i < layers.size(); ++i) {
    Annotate(layers[i].layer, results[i]);
    layer_results_[layers[i].layer] = std::move(results[i]);
  }
  const absl::Duration elapsed = clock_.Monotonic() - start;
  times_.select += elapsed;
  times_.score -= elapsed;
  return absl::OkStatus();
}

absl::Status KeepSetBuilder::Finish() {
  if (is_shared()) return CutShared();
  const absl::Duration start = clock_.Monotonic();
  if (policy().locality() == Locality::kGlobal) {
    std::vector<kernels::ScoreBuffer*> scores;
    for (const auto& buffer : layer_scores_) scores.push_back(buffer.get());
    KEEPSET_RETURN_IF_ERROR(policy().FinishScores(context_, scores));
    KEEPSET_RETURN_IF_ERROR(backend_.Wait(*plan_.op_context));
    times_.score += clock_.Monotonic() - start;
    if (!is_sequence()) return CutTogether();
    const absl::Duration before_merge = clock_.Monotonic();
    for (int64_t layer = 0; layer < num_layers(); ++layer) {
      KEEPSET_RETURN_IF_ERROR(MergeIntoSequence(*layer_scores_[layer]));
      layer_scores_[layer].reset();
    }
    times_.select += clock_.Monotonic() - before_merge;
  }
  if (is_sequence()) return CutSequence();
  return cutter_->CutsLayersApart() ? absl::OkStatus() : CutTogether();
}

// Every group of layers is cut once; in scope sequence their scores are merged first, each as
// often as it has layers.
absl::Status KeepSetBuilder::CutShared() {
  const absl::Duration start = clock_.Monotonic();
  std::vector<kernels::ScoreBuffer*> scores;
  for (const auto& buffer : layer_scores_) scores.push_back(buffer.get());
  KEEPSET_RETURN_IF_ERROR(policy().FinishScores(context_, scores));
  KEEPSET_RETURN_IF_ERROR(backend_.Wait(*plan_.op_context));
  cutter_->set_limit(policy().ChosenLimit(std::min(plan_.budget_tokens, seq_len())));
  const absl::Duration before_cut = clock_.Monotonic();
  times_.score += before_cut - start;
  if (is_sequence() && scores.size() > 1) {
    for (int64_t layer = 0; layer < num_layers(); ++layer) {
      KEEPSET_RETURN_IF_ERROR(
          cutter_->MergeLayer(*scores[policy().LayerGroup(layer)], sequence_scores_));
    }
    return CutSequence();
  }
  const std::vector<float> taus(scores.size(), -std::numeric_limits<float>::infinity());
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<LayerResult> results,
                           cutter_->CutLayers(scores, taus));
  for (int64_t layer = 0; layer < num_layers(); ++layer) {
    layer_results_[layer] = results[policy().LayerGroup(layer)];
  }
  times_.select += clock_.Monotonic() - before_cut;
  return absl::OkStatus();
}

absl::Status KeepSetBuilder::CutSequence() {
  const absl::Duration start = clock_.Monotonic();
  double tau_sum = 0.0;
  for (int64_t layer = 0; layer < num_layers(); ++layer) tau_sum += policy().Verdict(layer).tau;
  const float tau = static_cast<float>(tau_sum / static_cast<double>(num_layers()));
  KEEPSET_ASSIGN_OR_RETURN(const LayerResult result, cutter_->CutLayer(*sequence_scores_, tau));
  for (int64_t layer = 0; layer < num_layers(); ++layer) {
    layer_results_[layer] = result;
    Annotate(layer, *layer_results_[layer]);
  }
  times_.select += clock_.Monotonic() - start;
  return absl::OkStatus();
}

// Every layer's scores are final and kept.
absl::Status KeepSetBuilder::CutTogether() {
  const absl::Duration start = clock_.Monotonic();
  std::vector<kernels::ScoreBuffer*> scores;
  std::vector<float> taus;
  std::vector<std::unique_ptr<kernels::ScoreBuffer>> merged(num_layers());
  for (int64_t layer = 0; layer < num_layers(); ++layer) {
    KEEPSET_ASSIGN_OR_RETURN(kernels::ScoreBuffer* const buffer,
                             cutter_->MergeHeads(*layer_scores_[layer], merged[layer]));
    scores.push_back(buffer);
    taus.push_back(policy().Verdict(layer).tau);
  }
  KEEPSET_ASSIGN_OR_RETURN(std::vector<LayerResult> results, cutter_->CutsLayersApart()
                                                                 ? cutter_->CutLayers(scores, taus)
                                                                 : cutter_->CutEqual(scores, taus));
  for (int64_t layer = 0; layer < num_layers(); ++layer) {
    Annotate(layer, results[layer]);
    layer_results_[layer] = std::move(results[layer]);
  }
  times_.select += clock_.Monotonic() - start;
  return absl::OkStatus();
}

void KeepSetBuilder::Annotate(int64_t layer, LayerResult& result) const {
  const LayerVerdict verdict = policy().Verdict(layer);
  result.entropy = verdict.entropy;
  result.entropy_bin = verdict.entropy_bin;
}

std::vector<LayerResult> KeepSetBuilder::TakeLayerResults() {
  std::vector<LayerResult> results;
  for (std::optional<LayerResult>& layer : layer_results_) {
    KEEPSET_CHECK(layer.has_value());
    results.push_back(*std::move(layer));
  }
  return results;
}

void KeepSetBuilder::Clear() {
  layer_results_.clear();
  layer_scores_.clear();
  spare_scores_.clear();
  merged_scores_.clear();
  sequence_scores_.reset();
}

}  // namespace keepset::engine
