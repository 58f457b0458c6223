// compilerkv: utility = attention mass x value norm, weighted by a compiled head table and gated by
// a compiled threshold (methods.md 1.1).
//
// alpha does not depend on the head, so s[l, t] = T * mean_attention[t] * m_l[t] with
// m_l[t] = max_g(Wg[l, g] * rho[l, g, t]) and Wg the largest head weight of the group: one row per
// layer is buffered until alpha is complete (methods.md 1.6 a).
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "engine/policies/retention_policy.h"
#include "engine/policies/window_columns.h"
#include "tables/decision_table.h"
#include "tables/model_fingerprint.h"

namespace keepset::engine {
namespace {

// The floor of a mean value norm (methods.md 1.1 step 2).
constexpr float kEpsilon = 1e-8f;

// With a row's own log-sum-exp its attention sums to 1; what a cache in fewer bits than the
// engine's attention saw adds stays far below .05. A log-sum-exp below 128 that was rounded to
// `dtype` is wrong by up to half a unit in the last place: 2^-5 in f16, 2^-2 in bf16.
double MassTolerance(kernels::DType dtype) {
  switch (dtype) {
    case kernels::DType::kF32:
      return 0.05;
    case kernels::DType::kF16:
      return 0.05 + std::expm1(0x1p-5);
    case kernels::DType::kBF16:
      return 0.05 + std::expm1(0x1p-2);
  }
  return 0.0;
}

// Whose attention alpha is.
enum class AlphaScope {
  kGlobal,  // all layers and heads: the paper
  kLayer,   // the layer's heads
  kHead,    // the heads of one KV head; entropy and gate by the layer's mean
};
enum class MissingPpl { kError, kMedian };
enum class BelowBudget { kKeepAll, kGate };

struct Settings {
  int64_t window = 64;
  AlphaScope alpha_scope = AlphaScope::kGlobal;
  MissingPpl missing_ppl = MissingPpl::kError;
  tables::TableBudgetMatch budget_match = tables::TableBudgetMatch::kExact;
  tables::LayerMatch layer_match = tables::LayerMatch::kExact;
  tables::FingerprintMatch fingerprint_match = tables::FingerprintMatch::kFull;
  BelowBudget below_budget = BelowBudget::kKeepAll;
  int64_t pool_kernel = 1;
  int64_t min_kept = 1;
};

// 1.0 without edges.
double MedianEdge(absl::Span<const float> edges) {
  if (edges.empty()) return 1.0;
  const size_t middle = edges.size() / 2;
  if (edges.size() % 2 == 1) return edges[middle];
  return (static_cast<double>(edges[middle - 1]) + static_cast<double>(edges[middle])) / 2.0;
}

// Whether the worker's log-sum-exp normalises the attention.
bool IsByLse(const LayerObservation& observation) {
  return observation.window_lse.present() && !observation.attn_tile.present() &&
         !observation.column_stats.present();
}

absl::Status CheckMassByLse(double mass, double tolerance, absl::string_view where) {
  if (std::abs(mass - 1.0) <= tolerance) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(where, ": window_lse: by it the attention of a row sums to ", mass,
                   " in the mean, want 1 +- ", tolerance,
                   ": the log-sum-exp of softmax_scale * q.k over the positions "
                   "the row sees, in the stated base, or none"));
}

class CompilerKvPolicy final : public RetentionPolicy {
 public:
  explicit CompilerKvPolicy(const Settings& settings) : settings_(settings) {}

  // Whether a perplexity is needed depends on the table; Begin asks for it.
  Requirements requirements() const override {
    return {.observation = true,
            .columns = true,
            .max_rows = settings_.window,
            .values = true,
            .table_kind = "compilerkv"};
  }
  ScoreKind score_kind() const override { return ScoreKind::kThreshold; }
  Locality locality() const override {
    return settings_.alpha_scope == AlphaScope::kGlobal ? Locality::kGlobal : Locality::kLayer;
  }
  bool applies_below_budget() const override {
    return settings_.below_budget == BelowBudget::kGate;
  }
  int64_t min_kept() const override { return settings_.min_kept; }

  int64_t score_rows(const PolicyContext& context) const override {
    return context.scope == Scope::kKvHead ? context.spec.model.num_kv_heads : 1;
  }

  // A table with perplexity bins reads the prompt's perplexity.
  absl::StatusOr<InputNeeds> Needs(const OperationSpec& spec) const override {
    KEEPSET_ASSIGN_OR_RETURN(InputNeeds needs, RetentionPolicy::Needs(spec));
    const tables::CompilerKvTable* table =
        spec.table == nullptr ? nullptr : spec.table->AsCompilerKv();
    needs.ppl = table != nullptr && !table->ppl_edges().empty();
    return needs;
  }

  absl::Status Begin(PolicyContext& context) override {
    const OperationSpec& spec = context.spec;
    table_ = spec.table->AsCompilerKv();
    if (table_ == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat("policy compilerkv: table ",
                                                        spec.table->identity().name,
                                                        " holds no head weights and gates"));
    }
    KEEPSET_RETURN_IF_ERROR(tables::MatchFingerprint(
        table_->model(), spec.model, settings_.fingerprint_match, settings_.layer_match));
    KEEPSET_ASSIGN_OR_RETURN(slice_, table_->Slice(context.budget_tokens, settings_.budget_match,
                                                   spec.model.num_layers, settings_.layer_match));
    diagnostics_.relaxed = slice_.relaxed;
    if (settings_.fingerprint_match == tables::FingerprintMatch::kShape) {
      for (std::string& relaxed : tables::ShapeRelaxations(table_->model(), spec.model)) {
        diagnostics_.relaxed.push_back(std::move(relaxed));
      }
    }
    KEEPSET_RETURN_IF_ERROR(ChoosePplBin(context));

    num_rows_ =
        std::min<int64_t>(settings_.window, static_cast<int64_t>(context.row_positions.size()));
    verdicts_.resize(spec.model.num_layers);
    return stages_ == nullptr ? NewStages(context) : absl::OkStatus();
  }

  // What depends on the observations alone serves two tables: head weights and gates come after.
  Sharing ShareStages(const RetentionPolicy& decider) override {
    stages_ = static_cast<const CompilerKvPolicy&>(decider).stages_;
    is_decider_ = false;
    return Sharing::kShared;
  }

  absl::Status Score(PolicyContext& context, absl::Span<const ObservedLayer> layers,
                     absl::Span<kernels::ScoreBuffer* const> scores) override {
    kernels::ComputeBackend& backend = context.backend;
    kernels::OpContext& op = context.op_context;
    for (const ObservedLayer& layer : layers) {
      all_by_lse_ = all_by_lse_ && IsByLse(layer.observation);
      lse_tolerance_ = std::max(lse_tolerance_, MassTolerance(layer.observation.window_lse.dtype));
    }
    if (is_decider_) KEEPSET_RETURN_IF_ERROR(ObserveLayers(context, layers));
    for (size_t i = 0; i < layers.size(); ++i) {
      KEEPSET_RETURN_IF_ERROR(backend.MergeRows(op, stages_->rho(i), kernels::Merge::kMax,
                                                GroupWeights(context, layers[i].layer),
                                                *scores[i]));
    }
    if (settings_.alpha_scope == AlphaScope::kGlobal) return absl::OkStatus();
    for (size_t i = 0; i < layers.size(); ++i) {
      if (settings_.alpha_scope == AlphaScope::kLayer) {
        KEEPSET_RETURN_IF_ERROR(
            backend.Multiply(op, *stages_->layer_means[i], SeqLen(context), *scores[i]));
      }
      KEEPSET_RETURN_IF_ERROR(PoolScores(context, *scores[i]));
    }
    return absl::OkStatus();
  }

  absl::Status Commit(PolicyContext& context, absl::Span<const ObservedLayer> layers,
                      absl::Span<kernels::ScoreBuffer* const> /*scores*/) override {
    if (settings_.alpha_scope != AlphaScope::kGlobal) return GateLayers(context, layers);
    for (size_t i = 0; is_decider_ && i < layers.size(); ++i) {
      KEEPSET_RETURN_IF_ERROR(context.backend.Accumulate(
          context.op_context, *stages_->layer_means[i], kernels::Merge::kMean,
          1.0f / static_cast<float>(context.spec.model.num_layers), *stages_->global_mean));
    }
    return absl::OkStatus();
  }

  absl::Status FinishScores(PolicyContext& context,
                            absl::Span<kernels::ScoreBuffer* const> scores) override {
    const absl::StatusOr<kernels::ComputeBackend::Mass> mass =
        context.backend.MassAndEntropy(context.op_context, *stages_->global_mean, 0);
    if (!mass.ok()) {
      return absl::Status(mass.status().code(),
                          absl::StrCat("attention mass of all layers: ", mass.status().message()));
    }
    if (all_by_lse_)
      KEEPSET_RETURN_IF_ERROR(CheckMassByLse(mass->sum, lse_tolerance_, "all layers"));
    diagnostics_.entropy = mass->entropy;
    diagnostics_.entropy_bin = tables::BinOf(table_->entropy_edges(), mass->entropy);
    for (size_t layer = 0; layer < scores.size(); ++layer) {
      KEEPSET_RETURN_IF_ERROR(context.backend.Multiply(context.op_context, *stages_->global_mean,
                                                       SeqLen(context), *scores[layer]));
      KEEPSET_RETURN_IF_ERROR(PoolScores(context, *scores[layer]));
      Gate(static_cast<int64_t>(layer), mass->entropy);
    }
    return absl::OkStatus();
  }

  LayerVerdict Verdict(int64_t layer) const override { return verdicts_[layer]; }
  PolicyDiagnostics diagnostics() const override { return diagnostics_; }

 private:
  // Of the layers of one call, but for global_mean; written by the deciding policy, read by both.
  struct Stages {
    WindowStage window;
    std::vector<std::unique_ptr<kernels::ScoreBuffer>> layer_means;  // [1, T]
    std::unique_ptr<kernels::ScoreBuffer> global_mean;               // [1, T], alpha_scope global
    std::unique_ptr<kernels::ScoreBuffer> head_means;                // [Hkv, T], alpha_scope head

    // [Hkv, T], in the place of the value norms.
    kernels::ScoreBuffer& rho(size_t i) const { return window.value_norms(i); }
  };

  absl::Status NewStages(const PolicyContext& context) {
    const auto new_buffer = [&](int64_t rows) {
      return context.backend.NewBuffer(rows, context.spec.seq_len);
    };
    auto stages = std::make_shared<Stages>();
    KEEPSET_RETURN_IF_ERROR(
        stages->window.Begin(context, num_rows_, WindowStage::ValueNorms::kWanted));
    KEEPSET_ASSIGN_OR_RETURN(stages->layer_means.emplace_back(), new_buffer(1));
    if (settings_.alpha_scope == AlphaScope::kGlobal) {
      KEEPSET_ASSIGN_OR_RETURN(stages->global_mean, new_buffer(1));
    }
    if (settings_.alpha_scope == AlphaScope::kHead) {
      KEEPSET_ASSIGN_OR_RETURN(stages->head_means, new_buffer(context.spec.model.num_kv_heads));
    }
    stages_ = std::move(stages);
    return absl::OkStatus();
  }

  absl::Status ObserveLayers(PolicyContext& context, absl::Span<const ObservedLayer> layers) {
    kernels::ComputeBackend& backend = context.backend;
    kernels::OpContext& op = context.op_context;
    while (stages_->layer_means.size() < layers.size()) {
      KEEPSET_ASSIGN_OR_RETURN(std::unique_ptr<kernels::ScoreBuffer> mean,
                               backend.NewBuffer(1, context.spec.seq_len));
      stages_->layer_means.push_back(std::move(mean));
    }
    KEEPSET_RETURN_IF_ERROR(stages_->window.Run(context, layers));
    for (size_t i = 0; i < layers.size(); ++i) {
      const kernels::ScoreBuffer& columns = stages_->window.columns(i);
      kernels::ScoreBuffer& rho = stages_->rho(i);
      KEEPSET_RETURN_IF_ERROR(
          backend.MergeRows(op, columns, kernels::Merge::kMean, {}, *stages_->layer_means[i]));
      KEEPSET_RETURN_IF_ERROR(backend.DivideByRowMean(op, kEpsilon, rho));
      if (settings_.alpha_scope != AlphaScope::kHead) continue;
      KEEPSET_RETURN_IF_ERROR(
          backend.MergeRows(op, columns, kernels::Merge::kMean, {}, *stages_->head_means));
      KEEPSET_RETURN_IF_ERROR(backend.Multiply(op, *stages_->head_means, SeqLen(context), rho));
    }
    return absl::OkStatus();
  }

  // alpha_scope layer and head: every layer's own attention gates it.
  absl::Status GateLayers(PolicyContext& context, absl::Span<const ObservedLayer> layers) {
    std::vector<const kernels::ScoreBuffer*> means;
    for (size_t i = 0; i < layers.size(); ++i) means.push_back(stages_->layer_means[i].get());
    const absl::StatusOr<std::vector<kernels::ComputeBackend::Mass>> masses =
        context.backend.MassAndEntropyOfEach(context.op_context, means);
    if (!masses.ok()) {
      return absl::Status(masses.status().code(),
                          absl::StrCat("layer ", layers.front().layer,
                                       ": attention mass: ", masses.status().message()));
    }
    for (size_t i = 0; i < layers.size(); ++i) {
      const int64_t layer = layers[i].layer;
      if (IsByLse(layers[i].observation)) {
        KEEPSET_RETURN_IF_ERROR(
            CheckMassByLse((*masses)[i].sum, MassTolerance(layers[i].observation.window_lse.dtype),
                           absl::StrCat("layer ", layer)));
      }
      const double entropy = (*masses)[i].entropy;
      Gate(layer, entropy);
      verdicts_[layer].entropy = entropy;
      verdicts_[layer].entropy_bin = tables::BinOf(table_->entropy_edges(), entropy);
    }
    return absl::OkStatus();
  }

  static float SeqLen(const PolicyContext& context) {
    return static_cast<float>(context.spec.seq_len);
  }

  absl::Status ChoosePplBin(const PolicyContext& context) {
    diagnostics_.ppl = WindowPpl(context);
    if (diagnostics_.ppl.has_value() && !std::isfinite(*diagnostics_.ppl)) {
      return absl::InvalidArgumentError(absl::StrCat("policy compilerkv: ppl=", *diagnostics_.ppl,
                                                     " of the last ", settings_.window,
                                                     " window_logprobs, want finite"));
    }
    ppl_bin_ = 0;
    // One bin: the table has no perplexity axis, and asks for none.
    if (slice_.num_ppl_bins > 1) {
      if (!diagnostics_.ppl.has_value()) {
        if (settings_.missing_ppl == MissingPpl::kError) {
          return absl::InvalidArgumentError(
              "policy compilerkv: missing ppl, want ppl or window_logprobs, or parameter "
              "missing_ppl=median");
        }
        diagnostics_.ppl = MedianEdge(table_->ppl_edges());
        diagnostics_.defaulted_inputs.push_back(DefaultedInput::kPpl);
      }
      ppl_bin_ = tables::BinOf(table_->ppl_edges(), *diagnostics_.ppl);
    }
    if (diagnostics_.ppl.has_value()) diagnostics_.ppl_bin = ppl_bin_;
    return absl::OkStatus();
  }

  // Perplexity of the last `window` tokens when more log-probabilities were given.
  std::optional<double> WindowPpl(const PolicyContext& context) const {
    const std::vector<float>& logprobs = context.spec.window_logprobs;
    const int64_t given = static_cast<int64_t>(logprobs.size());
    if (context.spec.ppl.has_value() || given <= settings_.window) return context.ppl;
    double sum = 0.0;
    for (int64_t i = given - settings_.window; i < given; ++i) sum += logprobs[i];
    return std::exp(-sum / static_cast<double>(settings_.window));
  }

  // Wg[g]: only the largest weight of a group can win the maximum over heads, attention mass and
  // value norms being the group's own and not negative.
  std::vector<float> GroupWeights(const PolicyContext& context, int64_t layer) const {
    const int64_t num_kv_heads = context.spec.model.num_kv_heads;
    const int64_t group = context.spec.model.num_qo_heads / num_kv_heads;
    std::vector<float> weights(num_kv_heads, std::numeric_limits<float>::lowest());
    for (int64_t head = 0; head < context.spec.model.num_qo_heads; ++head) {
      weights[head / group] = std::max(weights[head / group], slice_.head_weight(layer, head));
    }
    return weights;
  }

  absl::Status PoolScores(PolicyContext& context, kernels::ScoreBuffer& scores) const {
    if (settings_.pool_kernel == 1) return absl::OkStatus();
    return context.backend.Pool(context.op_context, kernels::PoolKind::kAverage,
                                settings_.pool_kernel, context.spec.seq_len, scores);
  }

  void Gate(int64_t layer, double entropy) {
    verdicts_[layer].tau =
        slice_.gate(layer, tables::BinOf(table_->entropy_edges(), entropy), ppl_bin_);
  }

  const Settings settings_;
  const tables::CompilerKvTable* table_ = nullptr;  // held by the spec
  tables::CompilerKvSlice slice_;
  int64_t num_rows_ = 0;
  int64_t ppl_bin_ = 0;
  std::vector<LayerVerdict> verdicts_;  // [L]
  std::shared_ptr<Stages> stages_;
  bool all_by_lse_ = true;      // every layer so far brought its log-sum-exp
  double lse_tolerance_ = 0.0;  // of the coarsest so far
  bool is_decider_ = true;      // false: another policy writes stages_
  PolicyDiagnostics diagnostics_;
};

absl::StatusOr<Settings> ReadSettings(PolicyParameters& parameters) {
  Settings settings;
  constexpr int64_t kMaxCount = std::numeric_limits<int32_t>::max();
  KEEPSET_ASSIGN_OR_RETURN(settings.window, parameters.Int("window", 64, 1, kMaxCount));
  KEEPSET_ASSIGN_OR_RETURN(const std::string alpha_scope,
                           parameters.Choice("alpha_scope", {"global", "layer", "head"}));
  if (alpha_scope == "layer") settings.alpha_scope = AlphaScope::kLayer;
  if (alpha_scope == "head") settings.alpha_scope = AlphaScope::kHead;
  KEEPSET_ASSIGN_OR_RETURN(const std::string missing_ppl,
                           parameters.Choice("missing_ppl", {"error", "median"}));
  if (missing_ppl == "median") settings.missing_ppl = MissingPpl::kMedian;
  KEEPSET_ASSIGN_OR_RETURN(const std::string table_budget,
                           parameters.Choice("table_budget", {"exact", "nearest"}));
  if (table_budget == "nearest") settings.budget_match = tables::TableBudgetMatch::kNearest;
  KEEPSET_ASSIGN_OR_RETURN(const std::string layer_match,
                           parameters.Choice("layer_match", {"exact", "interpolate_depth"}));
  if (layer_match == "interpolate_depth") {
    settings.layer_match = tables::LayerMatch::kInterpolateDepth;
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::string fingerprint_match,
                           parameters.Choice("fingerprint_match", {"full", "shape"}));
  if (fingerprint_match == "shape") {
    settings.fingerprint_match = tables::FingerprintMatch::kShape;
  }
  KEEPSET_ASSIGN_OR_RETURN(const int64_t gate_below_budget,
                           parameters.Int("gate_below_budget", 0, 0, 1));
  if (gate_below_budget == 1) settings.below_budget = BelowBudget::kGate;
  KEEPSET_ASSIGN_OR_RETURN(settings.pool_kernel, parameters.Int("pool_kernel", 1, 1, kMaxCount));
  if (settings.pool_kernel % 2 == 0) {
    return absl::InvalidArgumentError(absl::StrCat("policy compilerkv: parameter pool_kernel=",
                                                   settings.pool_kernel, ", want an odd integer"));
  }
  KEEPSET_ASSIGN_OR_RETURN(settings.min_kept, parameters.Int("min_kept", 1, 1, kMaxCount));
  return settings;
}

}  // namespace

absl::StatusOr<std::unique_ptr<RetentionPolicy>> NewCompilerKvPolicy(PolicyParameters& parameters) {
  KEEPSET_ASSIGN_OR_RETURN(const Settings settings, ReadSettings(parameters));
  return std::make_unique<CompilerKvPolicy>(settings);
}

}  // namespace keepset::engine
