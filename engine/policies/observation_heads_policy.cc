// observation_heads: a few (layer, head) observations of a table, one score for the whole sequence
// (docs/observation-heads.md). Per observation: attention of chosen rows, or novelty of keys ->
// pooling -> normalisation outside protected positions -> weight; merged over observations, then
// dilated. Layers the table does not name are not looked at.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "engine/policies/observation_risk.h"
#include "engine/policies/retention_policy.h"
#include "tables/observation_heads_table.h"

namespace keepset::engine {
namespace {

using tables::HeadObservation;
using tables::ObservedRows;

// Columns of one layer's observations, as spec_check bounds those of other policies.
constexpr int64_t kMaxColumns = int64_t{1} << 29;

// Rows of the request, as indices into its W rows.
struct RowRange {
  int64_t begin = 0;
  int64_t end = 0;
};

struct Settings {
  std::optional<std::pair<int64_t, int64_t>> observe;  // positions [begin, end)
  std::optional<std::string> probe;
  tables::FingerprintMatch fingerprint_match = tables::FingerprintMatch::kFull;
  RiskSettings risk;
};

// What the table wants of one layer, in the order of the score rows.
struct LayerPlan {
  std::vector<HeadObservation> attention;  // ordered by head
  std::vector<HeadObservation> novelty;
  std::vector<kernels::HeadRows> head_rows;  // of `attention`
  std::vector<int64_t> kv_heads;             // of `novelty`

  bool empty() const { return attention.empty() && novelty.empty(); }
};

std::vector<float> Weights(const std::vector<HeadObservation>& observations) {
  std::vector<float> weights;
  weights.reserve(observations.size());
  for (const HeadObservation& one : observations) weights.push_back(one.weight);
  return weights;
}

absl::StatusOr<const tables::ObservationHeadsTable*> TableOf(const OperationSpec& spec) {
  if (spec.table == nullptr) {
    return absl::NotFoundError(
        "policy observation_heads needs a table of kind observation_heads, none given");
  }
  const tables::ObservationHeadsTable* table = spec.table->AsObservationHeads();
  if (table != nullptr) return table;
  return absl::FailedPreconditionError(absl::StrCat("policy observation_heads: table ",
                                                    spec.table->identity().name,
                                                    " lists no observing heads"));
}

// The observations of weight above 0, ordered by layer, head and rows.
std::vector<HeadObservation> Ordered(const tables::ObservationHeadsTable& table) {
  std::vector<HeadObservation> ordered;
  for (const HeadObservation& one : table.observations()) {
    if (one.weight > 0.0f) ordered.push_back(one);
  }
  std::sort(ordered.begin(), ordered.end(), [](const HeadObservation& a, const HeadObservation& b) {
    return std::tie(a.layer, a.head, a.rows) < std::tie(b.layer, b.head, b.rows);
  });
  return ordered;
}

bool Contains(const std::vector<int64_t>& values, int64_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
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
    const absl::StatusOr<const tables::ObservationHeadsTable*> table = TableOf(spec);
    if (!table.ok() || (*table)->settings().layer_groups.empty()) return std::nullopt;
    return Scope::kLayerEqual;
  }
  bool NeedsLayer(int64_t layer) const override { return !plans_[layer].empty(); }
  Requirements layer_requirements(int64_t layer) const override {
    const LayerPlan& plan = plans_[layer];
    return {.observation = !plan.attention.empty(), .keys = !plan.novelty.empty()};
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
  absl::Status FindRows(const PolicyContext& context);
  absl::Status CheckProbe() const;
  absl::StatusOr<RowRange> RowsOf(const HeadObservation& one) const;
  // Scores of one layer's observations, one row each; null where the table names none.
  struct LayerColumns {
    std::unique_ptr<kernels::ScoreBuffer> attention;
    std::unique_ptr<kernels::ScoreBuffer> novelty;
  };
  absl::StatusOr<LayerColumns> NewColumns(const PolicyContext& context,
                                          const LayerPlan& plan) const;
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
  std::vector<LayerPlan> plans_;                          // [L]
  std::vector<std::string> relaxed_;
  RowRange prompt_rows_;        // rows of the prompt
  RowRange observed_rows_;      // those of them that `observe` names, or all
  RowRange probe_rows_;         // rows behind the prompt
  std::vector<bool> is_begun_;  // [groups]: whether a layer was added to the group's scores
  std::unique_ptr<kernels::ScoreBuffer> merged_;  // [1, T]
  std::vector<LayerColumns> columns_;             // of the layers between Score and Commit
  RiskOutcome risk_;
};

absl::StatusOr<InputNeeds> ObservationHeadsPolicy::Needs(const OperationSpec& spec) const {
  KEEPSET_ASSIGN_OR_RETURN(const tables::ObservationHeadsTable* table, TableOf(spec));
  KEEPSET_RETURN_IF_ERROR(tables::MatchFingerprint(
      table->model(), spec.model, settings_.fingerprint_match, tables::LayerMatch::kExact));
  const int64_t group = spec.model.num_qo_heads / spec.model.num_kv_heads;
  InputNeeds needs;
  for (const HeadObservation& one : Ordered(*table)) {
    if (needs.layers.empty() || needs.layers.back().layer != one.layer) {
      needs.layers.emplace_back().layer = one.layer;
    }
    LayerInputNeeds& layer = needs.layers.back();
    layer.keys = true;
    const bool is_key = one.rows == ObservedRows::kKeyNovelty;
    const int64_t kv_head = is_key ? one.head : one.head / group;
    if (!Contains(layer.kv_heads, kv_head)) layer.kv_heads.push_back(kv_head);
    if (!is_key) {
      layer.queries = true;
      if (!Contains(layer.qo_heads, one.head)) layer.qo_heads.push_back(one.head);
    }
    needs.last_row = needs.last_row || one.rows == ObservedRows::kLastRow;
    needs.observed_rows = needs.observed_rows || one.rows == ObservedRows::kMaxRows ||
                          one.rows == ObservedRows::kMeanRows;
    needs.probe_rows = needs.probe_rows || tables::NeedsProbeRows(one.rows);
  }
  for (LayerInputNeeds& layer : needs.layers) {
    std::sort(layer.kv_heads.begin(), layer.kv_heads.end());
  }
  if (needs.probe_rows) {
    needs.probe_name = table->settings().probe->name;
    needs.probe_text = table->settings().probe->text;
  }
  return needs;
}

absl::Status ObservationHeadsPolicy::Begin(PolicyContext& context) {
  const OperationSpec& spec = context.spec;
  KEEPSET_ASSIGN_OR_RETURN(table_, TableOf(spec));
  KEEPSET_RETURN_IF_ERROR(tables::MatchFingerprint(
      table_->model(), spec.model, settings_.fingerprint_match, tables::LayerMatch::kExact));
  if (settings_.fingerprint_match == tables::FingerprintMatch::kShape) {
    relaxed_ = tables::ShapeRelaxations(table_->model(), spec.model);
  }
  KEEPSET_RETURN_IF_ERROR(CheckRiskSettings(settings_.risk, *table_));
  KEEPSET_RETURN_IF_ERROR(FindRows(context));
  plans_.resize(spec.model.num_layers);
  is_begun_.assign(num_layer_groups(), false);
  for (const HeadObservation& one : Ordered(*table_)) {
    LayerPlan& plan = plans_[one.layer];
    if (one.rows == ObservedRows::kKeyNovelty) {
      plan.novelty.push_back(one);
      plan.kv_heads.push_back(one.head);
      continue;
    }
    KEEPSET_ASSIGN_OR_RETURN(const RowRange rows, RowsOf(one));
    const bool is_max = one.rows == ObservedRows::kMaxRows || one.rows == ObservedRows::kProbeMax;
    plan.attention.push_back(one);
    plan.head_rows.push_back({one.head, rows.begin, rows.end - rows.begin,
                              is_max ? kernels::RowReduction::kMax : kernels::RowReduction::kMean});
    const auto columns = static_cast<int64_t>(plan.attention.size()) * spec.seq_len;
    if (columns > kMaxColumns) {
      return absl::InvalidArgumentError(absl::StrCat("layer ", one.layer,
                                                     ": observations x seq_len = ", columns,
                                                     ", want at most ", kMaxColumns));
    }
  }
  KEEPSET_ASSIGN_OR_RETURN(merged_, context.backend.NewBuffer(1, spec.seq_len));
  return absl::OkStatus();
}

// Sorts the request's rows into those of the prompt, those that observe, and those of a probe.
absl::Status ObservationHeadsPolicy::FindRows(const PolicyContext& context) {
  const absl::Span<const int64_t> positions = context.row_positions;
  const auto row_at = [&](int64_t position) -> int64_t {
    return std::lower_bound(positions.begin(), positions.end(), position) - positions.begin();
  };
  const auto num_rows = static_cast<int64_t>(positions.size());
  prompt_rows_ = {0, row_at(context.spec.seq_len)};
  probe_rows_ = {prompt_rows_.end, num_rows};
  observed_rows_ = prompt_rows_;
  if (settings_.observe.has_value()) {
    const auto [begin, end] = *settings_.observe;
    if (end > context.spec.seq_len) {
      return absl::InvalidArgumentError(absl::StrCat("parameter observe=", begin, ":", end,
                                                     ", want rows inside the prompt of ",
                                                     context.spec.seq_len, " positions"));
    }
    observed_rows_ = {row_at(begin), row_at(end)};
    if (observed_rows_.end - observed_rows_.begin != end - begin) {
      int64_t missing = begin;
      for (int64_t i = observed_rows_.begin; i < observed_rows_.end; ++i) {
        if (positions[i] == missing) ++missing;
      }
      return absl::InvalidArgumentError(
          absl::StrCat("parameter observe=", begin, ":", end, ": position ", missing,
                       " is not among row_positions, want queries of every row in it"));
    }
  }
  if (probe_rows_.begin < probe_rows_.end && !table_->settings().probe.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "row_positions[", probe_rows_.begin, "]=", positions[probe_rows_.begin], ", want 0..",
        context.spec.seq_len - 1, ": table ", table_->identity().name, " names no probe"));
  }
  return CheckProbe();
}

absl::Status ObservationHeadsPolicy::CheckProbe() const {
  if (!settings_.probe.has_value()) return absl::OkStatus();
  const std::optional<tables::ObservationProbe>& probe = table_->settings().probe;
  if (probe.has_value() && probe->name == *settings_.probe) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("parameter probe=", *settings_.probe, ": table ", table_->identity().name,
                   probe.has_value() ? absl::StrCat(" wants probe ", probe->name)
                                     : std::string(" names no probe")));
}

absl::StatusOr<RowRange> ObservationHeadsPolicy::RowsOf(const HeadObservation& one) const {
  const std::string where =
      absl::StrCat("table ", table_->identity().name, ": layer ", one.layer, " head ", one.head,
                   " observes ", tables::ObservedRowsName(one.rows));
  if (tables::NeedsProbeRows(one.rows)) {
    const std::string& name = table_->settings().probe->name;
    if (probe_rows_.begin == probe_rows_.end) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, " of probe ", name,
                       ", want rows of the probe: row_positions at or behind seq_len"));
    }
    if (!settings_.probe.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ", want parameter probe=", name, " beside the probe's rows"));
    }
    return probe_rows_;
  }
  const RowRange rows = one.rows == ObservedRows::kLastRow
                            ? RowRange{std::max<int64_t>(0, prompt_rows_.end - 1), prompt_rows_.end}
                            : observed_rows_;
  if (rows.begin < rows.end) return rows;
  return absl::InvalidArgumentError(
      absl::StrCat(where, ", want at least one observed row of the prompt (num_rows)"));
}

absl::StatusOr<ObservationHeadsPolicy::LayerColumns> ObservationHeadsPolicy::NewColumns(
    const PolicyContext& context, const LayerPlan& plan) const {
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
  std::vector<kernels::WindowArgs> windows;
  std::vector<kernels::ScoreBuffer*> outs;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (columns[i].attention == nullptr) continue;
    const LayerObservation& observation = layers[i].observation;
    const LayerPlan& plan = plans_[layers[i].layer];
    names[i] = absl::StrCat("layer ", layers[i].layer);
    if (observation.attn_tile.present()) {
      kernels::TileArgs args;
      args.tile = observation.attn_tile;
      args.row_positions = context.row_positions;
      args.what = names[i];
      args.heads = plan.head_rows;
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
    args.heads = plan.head_rows;
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
  const bool wants_risk = !table_->settings().risk_curve.empty();
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

absl::StatusOr<std::pair<int64_t, int64_t>> ParseObserve(const std::string& text) {
  const std::vector<std::string> parts = absl::StrSplit(text, ':');
  int64_t begin = 0;
  int64_t end = 0;
  if (parts.size() == 2 && absl::SimpleAtoi(parts[0], &begin) && absl::SimpleAtoi(parts[1], &end) &&
      begin >= 0 && begin < end) {
    return std::pair(begin, end);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("policy observation_heads: parameter observe=", text,
                   ", want BEGIN:END with 0 <= BEGIN < END, positions of the observing rows"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<RetentionPolicy>> NewObservationHeadsPolicy(
    PolicyParameters& parameters) {
  Settings settings;
  if (const std::optional<std::string> observe = parameters.OptionalText("observe")) {
    KEEPSET_ASSIGN_OR_RETURN(settings.observe, ParseObserve(*observe));
  }
  settings.probe = parameters.OptionalText("probe");
  KEEPSET_ASSIGN_OR_RETURN(const std::string match,
                           parameters.Choice("fingerprint_match", {"full", "shape"}));
  if (absl::string_view(match) == "shape") {
    settings.fingerprint_match = tables::FingerprintMatch::kShape;
  }
  KEEPSET_ASSIGN_OR_RETURN(settings.risk, ReadRiskSettings(parameters));
  return std::make_unique<ObservationHeadsPolicy>(std::move(settings));
}

}  // namespace keepset::engine
