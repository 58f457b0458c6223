// observation_heads: a few (layer, head) observations of a table, one score for the whole sequence
// (docs/observation-heads.md). Per observation: attention of chosen rows, or novelty of keys ->
// pooling -> normalisation outside protected positions -> weight; merged over observations, then
// dilated. Layers the table does not name are not looked at.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/policies/observation_plan.h"
#include "engine/policies/observation_risk.h"
#include "engine/policies/retention_policy.h"
#include "tables/observation_heads_table.h"

namespace keepset::engine {
namespace {

using tables::HeadObservation;

struct Settings {
  ObservationRequest request;
  tables::FingerprintMatch fingerprint_match = tables::FingerprintMatch::kFull;
  RiskSettings risk;
};

std::vector<float> Weights(const std::vector<HeadObservation>& observations) {
  std::vector<float> weights;
  weights.reserve(observations.size());
  for (const HeadObservation& one : observations) weights.push_back(one.weight);
  return weights;
}

class ObservationHeadsPolicy final : public RetentionPolicy {
 public:
  explicit ObservationHeadsPolicy(Settings settings) : settings_(std::move(settings)) {}

  // What a layer must bring depends on the table.
  Requirements requirements() const override {
    return {.probe_rows = true, .table_kind = "observation_heads"};
  }
  Locality locality() const override { return Locality::kShared; }
  int64_t score_rows(const PolicyContext& /*context*/) const override { return 1; }
  int64_t num_layer_groups() const override {
    return std::max<int64_t>(1, static_cast<int64_t>(table_->settings().layer_groups.size()));
  }
  int64_t LayerGroup(int64_t layer) const override {
    const std::vector<tables::LayerGroup>& groups = table_->settings().layer_groups;
    int64_t group = 0;
    while (group + 1 < static_cast<int64_t>(groups.size()) && layer >= groups[group].end) ++group;
    return group;
  }
  std::optional<Scope> native_scope(const OperationSpec& spec) const override {
    const absl::StatusOr<const tables::ObservationHeadsTable*> table = ObservationTableOf(spec);
    if (!table.ok() || (*table)->settings().layer_groups.empty()) return std::nullopt;
    return Scope::kLayerEqual;
  }
  bool NeedsLayer(int64_t layer) const override { return !plans_[layer].empty(); }
  Requirements layer_requirements(int64_t layer) const override {
    const LayerObservations& plan = plans_[layer];
    return {
        .observation = !plan.attention.empty(), .keys = !plan.novelty.empty(), .some_heads = true};
  }
  int64_t ChosenLimit(int64_t limit) const override { return risk_.chosen.value_or(limit); }

  absl::StatusOr<InputNeeds> Needs(const OperationSpec& spec) const override;
  absl::Status Begin(PolicyContext& context) override;
  absl::Status Score(PolicyContext& context, absl::Span<const ObservedLayer> layers,
                     absl::Span<kernels::ScoreBuffer* const> scores) override;
  absl::Status Commit(PolicyContext& context, absl::Span<const ObservedLayer> layers,
                      absl::Span<kernels::ScoreBuffer* const> scores) override;
  absl::Status FinishScores(PolicyContext& context,
                            absl::Span<kernels::ScoreBuffer* const> scores) override;

  PolicyDiagnostics diagnostics() const override {
    PolicyDiagnostics diagnostics;
    diagnostics.relaxed = relaxed_;
    diagnostics.outside_mass = risk_.outside_mass;
    diagnostics.predicted_miss_rate = risk_.predicted_miss_rate;
    return diagnostics;
  }

 private:
  // Scores of one layer's observations, one row each; null where the table names none.
  struct LayerColumns {
    std::unique_ptr<kernels::ScoreBuffer> attention;
    std::unique_ptr<kernels::ScoreBuffer> novelty;
  };
  absl::StatusOr<LayerColumns> NewColumns(const PolicyContext& context,
                                          const LayerObservations& plan) const;
  absl::Status ObserveAttention(PolicyContext& context, absl::Span<const ObservedLayer> layers,
                                absl::Span<const LayerColumns> columns) const;
  absl::Status FinishAttention(PolicyContext& context, kernels::ScoreBuffer& columns) const;
  absl::Status ScoreNovelty(PolicyContext& context, const ObservedLayer& layer,
                            kernels::ScoreBuffer& columns) const;
  absl::Status AddLayer(PolicyContext& context, int64_t layer, const LayerColumns& columns,
                        kernels::ScoreBuffer& scores);
  kernels::Merge merge() const {
    return table_->settings().merge == tables::ObservationMerge::kMax ? kernels::Merge::kMax
                                                                      : kernels::Merge::kSum;
  }
  absl::Status PoolColumns(PolicyContext& context, kernels::ScoreBuffer& columns) const {
    if (table_->settings().pool_kernel == 1) return absl::OkStatus();
    return context.backend.Pool(context.op_context, kernels::PoolKind::kAverage,
                                table_->settings().pool_kernel, context.spec.seq_len, columns);
  }

  const Settings settings_;
  const tables::ObservationHeadsTable* table_ = nullptr;  // held by the spec
  std::vector<LayerObservations> plans_;                  // [L]
  std::vector<std::string> relaxed_;
  std::vector<bool> is_begun_;  // [groups]: whether a layer was added to the group's scores
  std::unique_ptr<kernels::ScoreBuffer> merged_;  // [1, T]
  std::vector<LayerColumns> columns_;             // of the layers between Score and Commit
  RiskOutcome risk_;
};

absl::StatusOr<InputNeeds> ObservationHeadsPolicy::Needs(const OperationSpec& spec) const {
  KEEPSET_ASSIGN_OR_RETURN(const tables::ObservationHeadsTable* table, ObservationTableOf(spec));
  KEEPSET_RETURN_IF_ERROR(tables::MatchFingerprint(
      table->model(), spec.model, settings_.fingerprint_match, tables::LayerMatch::kExact));
  return NeedsOfObservations(*table, spec.model);
}

absl::Status ObservationHeadsPolicy::Begin(PolicyContext& context) {
  const OperationSpec& spec = context.spec;
  KEEPSET_ASSIGN_OR_RETURN(table_, ObservationTableOf(spec));
  KEEPSET_RETURN_IF_ERROR(tables::MatchFingerprint(
      table_->model(), spec.model, settings_.fingerprint_match, tables::LayerMatch::kExact));
  if (settings_.fingerprint_match == tables::FingerprintMatch::kShape) {
    relaxed_ = tables::ShapeRelaxations(table_->model(), spec.model);
  }
  KEEPSET_RETURN_IF_ERROR(CheckRiskSettings(settings_.risk, *table_, context));
  KEEPSET_ASSIGN_OR_RETURN(plans_,
                           PlanObservations(*table_, settings_.request, spec.model.num_layers,
                                            context.row_positions, spec.seq_len));
  is_begun_.assign(num_layer_groups(), false);
  KEEPSET_ASSIGN_OR_RETURN(merged_, context.backend.NewBuffer(1, spec.seq_len));
  return absl::OkStatus();
}

absl::StatusOr<ObservationHeadsPolicy::LayerColumns> ObservationHeadsPolicy::NewColumns(
    const PolicyContext& context, const LayerObservations& plan) const {
  const auto new_columns = [&](const std::vector<HeadObservation>& observations) {
    return context.backend.NewBuffer(static_cast<int64_t>(observations.size()),
                                     context.spec.seq_len);
  };
  LayerColumns columns;
  if (!plan.attention.empty()) {
    KEEPSET_ASSIGN_OR_RETURN(columns.attention, new_columns(plan.attention));
  }
  if (!plan.novelty.empty()) {
    KEEPSET_ASSIGN_OR_RETURN(columns.novelty, new_columns(plan.novelty));
  }
  return columns;
}

// Attention of the chosen rows: layers that bring queries go to the backend together.
absl::Status ObservationHeadsPolicy::ObserveAttention(
    PolicyContext& context, absl::Span<const ObservedLayer> layers,
    absl::Span<const LayerColumns> columns) const {
  std::vector<std::string> names(layers.size());
  std::vector<std::vector<kernels::HeadRows>> heads(layers.size());
  std::vector<kernels::WindowArgs> windows;
  std::vector<kernels::ScoreBuffer*> outs;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (columns[i].attention == nullptr) continue;
    const LayerObservation& observation = layers[i].observation;
    const LayerObservations& plan = plans_[layers[i].layer];
    names[i] = absl::StrCat("layer ", layers[i].layer);
    KEEPSET_ASSIGN_OR_RETURN(
        heads[i], PlaceHeads(plan.head_rows, observation.qo_heads, context.spec.model, names[i]));
    if (observation.attn_tile.present()) {
      kernels::TileArgs args;
      args.tile = observation.attn_tile;
      args.row_positions = context.row_positions;
      args.what = names[i];
      args.heads = heads[i];
      KEEPSET_RETURN_IF_ERROR(
          context.backend.TileColumns(context.op_context, args, *columns[i].attention));
      continue;
    }
    kernels::WindowArgs& args = windows.emplace_back();
    args.q = observation.q_window;
    args.k = observation.k;
    args.row_positions = context.row_positions;
    args.window_lse = observation.window_lse;
    args.softmax_scale = context.spec.softmax_scale;
    args.what = names[i];
    args.heads = heads[i];
    outs.push_back(columns[i].attention.get());
  }
  if (windows.empty()) return absl::OkStatus();
  return context.backend.WindowColumnsOfLayers(context.op_context, windows, outs);
}

absl::Status ObservationHeadsPolicy::FinishAttention(PolicyContext& context,
                                                     kernels::ScoreBuffer& columns) const {
  KEEPSET_RETURN_IF_ERROR(PoolColumns(context, columns));
  const bool is_sum = table_->settings().normalization == tables::ObservationNormalization::kSum;
  return context.backend.NormalizeRows(
      context.op_context, is_sum ? kernels::Normalization::kSum : kernels::Normalization::kMax,
      context.protected_ranges, columns);
}

// Novelty is standardised before it is pooled: padding then counts as average.
absl::Status ObservationHeadsPolicy::ScoreNovelty(PolicyContext& context,
                                                  const ObservedLayer& layer,
                                                  kernels::ScoreBuffer& columns) const {
  KEEPSET_RETURN_IF_ERROR(context.backend.KeyNovelty(
      context.op_context, layer.observation.k, plans_[layer.layer].kv_heads,
      absl::StrCat("layer ", layer.layer, ": k"), columns));
  KEEPSET_RETURN_IF_ERROR(context.backend.NormalizeRows(
      context.op_context, kernels::Normalization::kStandardize, context.protected_ranges, columns));
  return PoolColumns(context, columns);
}

absl::Status ObservationHeadsPolicy::AddLayer(PolicyContext& context, int64_t layer,
                                              const LayerColumns& columns,
                                              kernels::ScoreBuffer& scores) {
  kernels::ComputeBackend& backend = context.backend;
  const int64_t group = LayerGroup(layer);
  if (!is_begun_[group] && merge() == kernels::Merge::kMax) {
    KEEPSET_RETURN_IF_ERROR(backend.Fill(context.op_context, 0, context.spec.seq_len,
                                         std::numeric_limits<float>::lowest(), scores));
  }
  is_begun_[group] = true;
  const auto add = [&](const std::unique_ptr<kernels::ScoreBuffer>& rows,
                       const std::vector<HeadObservation>& observations) -> absl::Status {
    if (rows == nullptr) return absl::OkStatus();
    KEEPSET_RETURN_IF_ERROR(
        backend.MergeRows(context.op_context, *rows, merge(), Weights(observations), *merged_));
    return backend.Accumulate(context.op_context, *merged_, merge(), 1.0f, scores);
  };
  KEEPSET_RETURN_IF_ERROR(add(columns.attention, plans_[layer].attention));
  return add(columns.novelty, plans_[layer].novelty);
}

absl::Status ObservationHeadsPolicy::Score(PolicyContext& context,
                                           absl::Span<const ObservedLayer> layers,
                                           absl::Span<kernels::ScoreBuffer* const> /*scores*/) {
  columns_.clear();
  for (const ObservedLayer& layer : layers) {
    KEEPSET_ASSIGN_OR_RETURN(LayerColumns fresh, NewColumns(context, plans_[layer.layer]));
    columns_.push_back(std::move(fresh));
  }
  KEEPSET_RETURN_IF_ERROR(ObserveAttention(context, layers, columns_));
  for (size_t i = 0; i < layers.size(); ++i) {
    if (columns_[i].attention != nullptr) {
      KEEPSET_RETURN_IF_ERROR(FinishAttention(context, *columns_[i].attention));
    }
    if (columns_[i].novelty != nullptr) {
      KEEPSET_RETURN_IF_ERROR(ScoreNovelty(context, layers[i], *columns_[i].novelty));
    }
  }
  return absl::OkStatus();
}

absl::Status ObservationHeadsPolicy::Commit(PolicyContext& context,
                                            absl::Span<const ObservedLayer> layers,
                                            absl::Span<kernels::ScoreBuffer* const> scores) {
  for (size_t i = 0; i < layers.size(); ++i) {
    KEEPSET_RETURN_IF_ERROR(AddLayer(context, layers[i].layer, columns_[i], *scores[i]));
  }
  columns_.clear();
  return absl::OkStatus();
}

absl::Status ObservationHeadsPolicy::FinishScores(PolicyContext& context,
                                                  absl::Span<kernels::ScoreBuffer* const> scores) {
  const bool wants_risk = !table_->settings().risk_curve.empty() && IsRiskKnown(*table_, context);
  for (kernels::ScoreBuffer* const group : scores) {
    std::vector<float> before(wants_risk ? context.spec.seq_len : 0);
    std::vector<float> after(before.size());
    if (wants_risk) {
      KEEPSET_RETURN_IF_ERROR(
          context.backend.CopyToHost(context.op_context, *group, absl::MakeSpan(before)));
    }
    if (table_->settings().dilate > 0) {
      KEEPSET_RETURN_IF_ERROR(
          context.backend.DilateForward(context.op_context, table_->settings().dilate, *group));
    }
    if (!wants_risk) continue;
    KEEPSET_RETURN_IF_ERROR(
        context.backend.CopyToHost(context.op_context, *group, absl::MakeSpan(after)));
    AddGroupRisk(settings_.risk, table_->settings().risk_curve, before, after,
                 context.protected_ranges, context.budget_tokens, risk_);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<RetentionPolicy>> NewObservationHeadsPolicy(
    PolicyParameters& parameters) {
  Settings settings;
  KEEPSET_ASSIGN_OR_RETURN(settings.request, ReadObservationRequest(parameters));
  KEEPSET_ASSIGN_OR_RETURN(const std::string match,
                           parameters.Choice("fingerprint_match", {"full", "shape"}));
  if (absl::string_view(match) == "shape") {
    settings.fingerprint_match = tables::FingerprintMatch::kShape;
  }
  KEEPSET_ASSIGN_OR_RETURN(settings.risk, ReadRiskSettings(parameters));
  return std::make_unique<ObservationHeadsPolicy>(std::move(settings));
}

}  // namespace keepset::engine
