#include "engine/operation.h"

#include <algorithm>
#include <limits>
#include <new>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "engine/budget.h"
#include "engine/cut.h"
#include "engine/protection.h"
#include "engine/spec_check.h"

namespace keepset::engine {
namespace {

// What Begin found out about a spec; the operation is made from it.
struct Plan {
  OperationSpec spec;
  std::unique_ptr<RetentionPolicy> policy;
  std::unique_ptr<kernels::OpContext> op_context;
  Requirements needs;
  Scope scope = Scope::kLayerEqual;
  int64_t budget_tokens = 0;
  std::vector<int64_t> row_positions;
  std::optional<double> ppl;
  CutOptions cut_options;
  PositionRanges protected_ranges;
};

class OperationImpl final : public Operation {
 public:
  OperationImpl(Plan plan, kernels::ComputeBackend& backend, const Clock& clock)
      : plan_(std::move(plan)),
        backend_(backend),
        clock_(clock),
        context_{
            plan_.spec,          backend_,  *plan_.op_context,     plan_.scope, plan_.budget_tokens,
            plan_.row_positions, plan_.ppl, plan_.protected_ranges} {}

  absl::Status BeginPolicy() {
    KEEPSET_RETURN_IF_ERROR(policy().Begin(context_));
    Cutter::Settings settings;
    settings.scope = plan_.scope;
    settings.options = plan_.cut_options;
    settings.score_kind = policy().score_kind();
    settings.seq_len = seq_len();
    settings.num_layers = num_layers();
    settings.num_kv_heads = spec().model.num_kv_heads;
    settings.limit = std::min(plan_.budget_tokens, seq_len());
    settings.min_kept = policy().min_kept();
    settings.protected_ranges = plan_.protected_ranges;
    settings.forced_ranges = JoinRanges(policy().ForcedRanges(context_));
    cutter_.emplace(std::move(settings), backend_, *plan_.op_context);
    keeps_all_ = policy().keeps_everything() ||
                 (plan_.budget_tokens >= seq_len() && !policy().applies_below_budget());
    layer_results_.resize(num_layers());
    const bool shared = policy().locality() == Locality::kShared;
    layer_scores_.resize(shared ? policy().num_layer_groups() : num_layers());
    return absl::OkStatus();
  }

  const OperationSpec& spec() const override { return plan_.spec; }

  absl::Status Observe(int64_t layer, const LayerObservation& observation) override {
    if (finished_) {
      return absl::FailedPreconditionError(
          absl::StrCat("layer ", layer, ": the operation is finished"));
    }
    if (next_layer_ == num_layers()) {
      return absl::InvalidArgumentError(absl::StrCat("layer ", layer, ": all ", num_layers(),
                                                     " layers were observed, want Finish"));
    }
    if (layer < next_layer_ || layer > NextNeededLayer()) {
      return absl::InvalidArgumentError(
          absl::StrCat("layer ", layer, ": out of order, want layer ", NextNeededLayer()));
    }
    const bool needed = policy().NeedsLayer(layer);
    KEEPSET_RETURN_IF_ERROR(CheckObservation(
        spec(), needed ? policy().layer_requirements(layer) : Requirements(), layer, observation));
    if (needed && !keeps_all_ && !DeadlinePassed() && DeviceWorks()) {
      absl::Status status = ScoreLayer(layer, observation);
      // A layer that a broken device could not score is no fault of the caller.
      if (!status.ok() && DeviceWorks()) return status;
      if (status.ok()) ObserveShadow(layer, observation);
    }
    next_layer_ = layer + 1;
    return absl::OkStatus();
  }

  const LayerResult* EarlyResult(int64_t layer) const override {
    if (finished_ || layer < 0 || layer >= next_layer_) return nullptr;
    const std::optional<LayerResult>& result = layer_results_[layer];
    return result.has_value() ? &*result : nullptr;
  }

  absl::StatusOr<const OperationResult*> Finish() override {
    if (finished_) return &result_;
    if (const int64_t next = NextNeededLayer(); next < num_layers()) {
      return absl::FailedPreconditionError(absl::StrCat("layer ", next,
                                                        ": not observed, want layers ", next, "..",
                                                        num_layers() - 1, " before Finish"));
    }
    KEEPSET_RETURN_IF_ERROR(finish_status_);
    if (keeps_all_) {
      return &FinishKeptFull(policy().keeps_everything() ? Reason::kNone : Reason::kBelowBudget);
    }
    if (!DeviceWorks()) return &FinishKeptFull(Reason::kDeviceFault);
    if (DeadlinePassed()) return &FinishKeptFull(Reason::kDeadline);
    // FinishScores works in place: a failed attempt cannot be repeated.
    finish_status_ = CutAll();
    if (!finish_status_.ok() && !DeviceWorks()) {
      finish_status_ = absl::OkStatus();
      return &FinishKeptFull(Reason::kDeviceFault);
    }
    KEEPSET_RETURN_IF_ERROR(finish_status_);
    FillResult();
    return &result_;
  }

  absl::StatusOr<std::unique_ptr<ShadowDecision>> TakeShadow() override {
    KEEPSET_RETURN_IF_ERROR(shadow_status_);
    // What was kept in full was no decision of the table's, but for "no saving".
    const bool decided =
        finished_ && (result_.reason == Reason::kNone || result_.reason == Reason::kNoSaving);
    if (shadow_ == nullptr || !decided) return nullptr;
    return NewShadowDecision(std::move(shadow_), result_);
  }

  // Nothing that goes wrong here is the operation's.
  void AttachShadow(absl::StatusOr<std::unique_ptr<OperationImpl>> shadow) {
    shadow_status_ = shadow.status();
    if (!shadow.ok()) return;
    if (plan_.needs.table_kind.empty()) {
      shadow_status_ = absl::InvalidArgumentError(
          absl::StrCat("shadow_table: policy ", spec().policy, " reads no table"));
      return;
    }
    shadow_ = *std::move(shadow);
    shadow_->policy().ShareStages(policy());
    shadow_status_ = shadow_->BeginPolicy();
    if (!shadow_status_.ok()) shadow_.reset();
  }

  const OperationResult& FinishKeptFull(Reason reason) override {
    // A device that fails in the gather takes back what was decided.
    if (finished_ && reason != Reason::kDeviceFault) return result_;
    std::vector<int32_t> everything(seq_len());
    std::iota(everything.begin(), everything.end(), 0);
    const int64_t sets = plan_.scope == Scope::kKvHead ? spec().model.num_kv_heads : 1;
    LayerResult full;
    full.keep_indices.assign(sets, everything);
    full.candidates.assign(sets, 0);
    full.filled.assign(sets, 0);
    result_.layers.assign(num_layers(), full);
    result_.outcome = spec().mode == Mode::kShadow ? Outcome::kShadow : Outcome::kKeptFull;
    result_.reason = reason;
    Describe();
    return result_;
  }

  absl::StatusOr<int64_t> GatherRows(int64_t layer) const override {
    KEEPSET_RETURN_IF_ERROR(CheckGatherLayer(layer));
    size_t rows = 0;
    for (const std::vector<int32_t>& set : result_.layers[layer].keep_indices) {
      rows = std::max(rows, set.size());
    }
    return static_cast<int64_t>(rows);
  }

  absl::Status Gather(int64_t layer, const kernels::KvView& k, const kernels::KvView& v,
                      const kernels::MutableKvView& out_k,
                      const kernels::MutableKvView& out_v) override {
    KEEPSET_RETURN_IF_ERROR(CheckGatherLayer(layer));
    if (spec().mode == Mode::kShadow) {
      return absl::FailedPreconditionError(absl::StrCat(
          "layer ", layer, ": a shadow operation is never applied, nothing to gather"));
    }
    const absl::Duration start = clock_.Monotonic();
    KEEPSET_RETURN_IF_ERROR(GatherOne(layer, "k", spec().model.head_dim, k, out_k));
    KEEPSET_RETURN_IF_ERROR(GatherOne(layer, "v", ValueHeadDim(spec()), v, out_v));
    result_.times.gather += clock_.Monotonic() - start;
    return absl::OkStatus();
  }

 private:
  RetentionPolicy& policy() const { return *plan_.policy; }
  int64_t num_layers() const { return plan_.spec.model.num_layers; }
  int64_t seq_len() const { return plan_.spec.seq_len; }
  bool is_sequence() const { return plan_.scope == Scope::kSequence; }
  bool is_shared() const { return policy().locality() == Locality::kShared; }

  // The first layer from the next on that cannot be left out.
  int64_t NextNeededLayer() const {
    int64_t layer = next_layer_;
    while (layer < num_layers() && !policy().NeedsLayer(layer)) ++layer;
    return layer;
  }

  // Once passed, it stays passed: no later layer is scored and Finish keeps everything.
  bool DeadlinePassed() {
    deadline_passed_ = deadline_passed_ || clock_.Monotonic() >= spec().deadline;
    return deadline_passed_;
  }

  bool DeviceWorks() const { return backend_.Health().ok(); }

  void ObserveShadow(int64_t layer, const LayerObservation& observation) {
    if (shadow_ == nullptr) return;
    try {
      shadow_status_ = shadow_->Observe(layer, observation);
    } catch (const std::bad_alloc&) {
      shadow_status_ = absl::ResourceExhaustedError(
          absl::StrCat("layer ", layer, ": no memory for the scores of the shadow table"));
    }
    if (!shadow_status_.ok()) shadow_.reset();
  }

  absl::Status ScoreLayer(int64_t layer, const LayerObservation& observation) {
    const absl::Duration start = clock_.Monotonic();
    if (is_shared()) {
      std::unique_ptr<kernels::ScoreBuffer>& scores = layer_scores_[policy().LayerGroup(layer)];
      if (scores == nullptr) {
        KEEPSET_ASSIGN_OR_RETURN(scores, backend_.NewBuffer(1, seq_len()));
      }
      KEEPSET_RETURN_IF_ERROR(policy().Score(context_, layer, observation, *scores));
      result_.times.score += clock_.Monotonic() - start;
      return absl::OkStatus();
    }
    // Scores that are cut or merged at once pass through one buffer.
    const bool keep_scores =
        policy().locality() == Locality::kGlobal || (!cutter_->CutsLayersApart() && !is_sequence());
    std::unique_ptr<kernels::ScoreBuffer> fresh = keep_scores ? nullptr : std::move(spare_scores_);
    if (fresh == nullptr) {
      KEEPSET_ASSIGN_OR_RETURN(fresh, backend_.NewBuffer(policy().score_rows(context_), seq_len()));
    }
    KEEPSET_RETURN_IF_ERROR(policy().Score(context_, layer, observation, *fresh));
    // The views end with this call, and a refused layer must not leave traces below.
    KEEPSET_RETURN_IF_ERROR(backend_.Wait(*plan_.op_context));
    if (keep_scores) {
      layer_scores_[layer] = std::move(fresh);
    } else {
      KEEPSET_RETURN_IF_ERROR(CutOrMerge(layer, *fresh));
      spare_scores_ = std::move(fresh);
    }
    result_.times.score += clock_.Monotonic() - start;
    return absl::OkStatus();
  }

  // One layer whose scores are final: into the scores of the sequence, or to its keep set.
  absl::Status CutOrMerge(int64_t layer, kernels::ScoreBuffer& scores) {
    KEEPSET_ASSIGN_OR_RETURN(kernels::ScoreBuffer* const merged,
                             cutter_->MergeHeads(scores, merged_scores_));
    if (is_sequence()) return cutter_->MergeLayer(*merged, sequence_scores_);
    const absl::Duration start = clock_.Monotonic();
    KEEPSET_ASSIGN_OR_RETURN(LayerResult result,
                             cutter_->CutLayer(*merged, policy().Verdict(layer).tau));
    Annotate(layer, result);
    layer_results_[layer] = std::move(result);
    const absl::Duration elapsed = clock_.Monotonic() - start;
    result_.times.select += elapsed;
    result_.times.score -= elapsed;
    return absl::OkStatus();
  }

  absl::Status CutAll() {
    if (is_shared()) return CutShared();
    const absl::Duration start = clock_.Monotonic();
    if (policy().locality() == Locality::kGlobal) {
      std::vector<kernels::ScoreBuffer*> scores;
      for (const auto& buffer : layer_scores_) scores.push_back(buffer.get());
      KEEPSET_RETURN_IF_ERROR(policy().FinishScores(context_, scores));
      KEEPSET_RETURN_IF_ERROR(backend_.Wait(*plan_.op_context));
      result_.times.score += clock_.Monotonic() - start;
      if (cutter_->CutsLayersApart() || is_sequence()) {
        const absl::Duration before_cut = clock_.Monotonic();
        for (int64_t layer = 0; layer < num_layers(); ++layer) {
          KEEPSET_RETURN_IF_ERROR(CutOrMerge(layer, *layer_scores_[layer]));
          layer_scores_[layer].reset();
        }
        if (is_sequence()) result_.times.select += clock_.Monotonic() - before_cut;
      }
    }
    if (is_sequence()) return CutSequence();
    if (!cutter_->CutsLayersApart()) return CutEqual();
    return absl::OkStatus();
  }

  // Every group of layers is cut once; in scope sequence their scores are merged first, each as
  // often as it has layers.
  absl::Status CutShared() {
    const absl::Duration start = clock_.Monotonic();
    std::vector<kernels::ScoreBuffer*> scores;
    for (const auto& buffer : layer_scores_) scores.push_back(buffer.get());
    KEEPSET_RETURN_IF_ERROR(policy().FinishScores(context_, scores));
    KEEPSET_RETURN_IF_ERROR(backend_.Wait(*plan_.op_context));
    cutter_->set_limit(policy().ChosenLimit(std::min(plan_.budget_tokens, seq_len())));
    const absl::Duration before_cut = clock_.Monotonic();
    result_.times.score += before_cut - start;
    if (is_sequence() && scores.size() > 1) {
      for (int64_t layer = 0; layer < num_layers(); ++layer) {
        KEEPSET_RETURN_IF_ERROR(
            cutter_->MergeLayer(*scores[policy().LayerGroup(layer)], sequence_scores_));
      }
      return CutSequence();
    }
    std::vector<LayerResult> results;
    for (kernels::ScoreBuffer* const group : scores) {
      KEEPSET_ASSIGN_OR_RETURN(LayerResult result,
                               cutter_->CutLayer(*group, -std::numeric_limits<float>::infinity()));
      results.push_back(std::move(result));
    }
    for (int64_t layer = 0; layer < num_layers(); ++layer) {
      layer_results_[layer] = results[policy().LayerGroup(layer)];
    }
    result_.times.select += clock_.Monotonic() - before_cut;
    return absl::OkStatus();
  }

  absl::Status CutSequence() {
    const absl::Duration start = clock_.Monotonic();
    double tau_sum = 0.0;
    for (int64_t layer = 0; layer < num_layers(); ++layer) tau_sum += policy().Verdict(layer).tau;
    const float tau = static_cast<float>(tau_sum / static_cast<double>(num_layers()));
    KEEPSET_ASSIGN_OR_RETURN(const LayerResult result, cutter_->CutLayer(*sequence_scores_, tau));
    for (int64_t layer = 0; layer < num_layers(); ++layer) {
      layer_results_[layer] = result;
      Annotate(layer, *layer_results_[layer]);
    }
    result_.times.select += clock_.Monotonic() - start;
    return absl::OkStatus();
  }

  absl::Status CutEqual() {
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
    KEEPSET_ASSIGN_OR_RETURN(std::vector<LayerResult> results, cutter_->CutEqual(scores, taus));
    for (int64_t layer = 0; layer < num_layers(); ++layer) {
      Annotate(layer, results[layer]);
      layer_results_[layer] = std::move(results[layer]);
    }
    result_.times.select += clock_.Monotonic() - start;
    return absl::OkStatus();
  }

  void Annotate(int64_t layer, LayerResult& result) const {
    const LayerVerdict verdict = policy().Verdict(layer);
    result.entropy = verdict.entropy;
    result.entropy_bin = verdict.entropy_bin;
  }

  void FillResult() {
    bool everything = true;
    for (std::optional<LayerResult>& layer : layer_results_) {
      KEEPSET_CHECK(layer.has_value());
      for (const std::vector<int32_t>& set : layer->keep_indices) {
        everything = everything && static_cast<int64_t>(set.size()) == seq_len();
      }
      result_.layers.push_back(*std::move(layer));
    }
    result_.has_candidates = policy().score_kind() == ScoreKind::kThreshold;
    result_.reason = everything ? Reason::kNoSaving : Reason::kNone;
    if (spec().mode == Mode::kShadow) {
      result_.outcome = Outcome::kShadow;
    } else {
      result_.outcome = everything ? Outcome::kKeptFull : Outcome::kCompressed;
    }
    Describe();
  }

  // What every result says, whatever its outcome; ends the operation and frees its scores.
  void Describe() {
    result_.policy = spec().policy;
    result_.scope = plan_.scope;
    result_.seq_len = seq_len();
    result_.budget_tokens = plan_.budget_tokens;
    if (!plan_.needs.table_kind.empty()) {
      result_.table = spec().table->identity();
      result_.table_source = std::string(spec().table->provenance_source());
    }
    PolicyDiagnostics diagnostics = policy().diagnostics();
    result_.entropy = diagnostics.entropy;
    result_.ppl = diagnostics.ppl;
    result_.entropy_bin = diagnostics.entropy_bin;
    result_.ppl_bin = diagnostics.ppl_bin;
    for (const DefaultedInput input : diagnostics.defaulted_inputs) {
      result_.defaulted_inputs.emplace_back(DefaultedInputName(input));
    }
    result_.relaxed = std::move(diagnostics.relaxed);
    result_.outside_mass = diagnostics.outside_mass;
    result_.predicted_miss_rate = diagnostics.predicted_miss_rate;
    result_.backend = backend_.name();
    const int64_t num_kv_heads = spec().model.num_kv_heads;
    const int64_t head_bytes = TokenBytes(spec()) / num_kv_heads;
    result_.bytes_before = num_layers() * num_kv_heads * seq_len() * head_bytes;
    int64_t head_rows = 0;
    for (const LayerResult& layer : result_.layers) {
      const int64_t heads_per_set = num_kv_heads / static_cast<int64_t>(layer.keep_indices.size());
      for (const std::vector<int32_t>& set : layer.keep_indices) {
        head_rows += heads_per_set * static_cast<int64_t>(set.size());
      }
    }
    result_.bytes_after = head_rows * head_bytes;
    finished_ = true;
    layer_results_.clear();
    layer_scores_.clear();
    spare_scores_.reset();
    merged_scores_.reset();
    sequence_scores_.reset();
  }

  absl::Status CheckGatherLayer(int64_t layer) const {
    if (!finished_) return absl::FailedPreconditionError("gather: the operation is not finished");
    if (layer < 0 || layer >= num_layers()) {
      return absl::InvalidArgumentError(
          absl::StrCat("gather: layer ", layer, ", want 0..", num_layers() - 1));
    }
    return absl::OkStatus();
  }

  absl::Status GatherOne(int64_t layer, absl::string_view name, int64_t head_dim,
                         const kernels::KvView& in, const kernels::MutableKvView& out) {
    const std::string what = absl::StrCat("layer ", layer, ": gather of ", name);
    if (!in.present() || !out.present()) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": missing ", in.present() ? "destination" : "source"));
    }
    KEEPSET_RETURN_IF_ERROR(CheckKv(spec(), in, head_dim, what));
    KEEPSET_RETURN_IF_ERROR(kernels::ValidateView(out, absl::StrCat(what, ": destination")));
    std::vector<absl::Span<const int32_t>> sets;
    for (const std::vector<int32_t>& set : result_.layers[layer].keep_indices) {
      sets.emplace_back(set);
    }
    absl::Status status = backend_.GatherRows(*plan_.op_context, in, sets, out);
    if (status.ok()) return status;
    return absl::Status(status.code(), absl::StrCat(what, ": ", status.message()));
  }

  Plan plan_;
  kernels::ComputeBackend& backend_;
  const Clock& clock_;
  PolicyContext context_;
  std::optional<Cutter> cutter_;
  bool keeps_all_ = false;
  bool deadline_passed_ = false;
  bool finished_ = false;
  absl::Status finish_status_;
  int64_t next_layer_ = 0;
  std::vector<std::optional<LayerResult>> layer_results_;  // [L]
  // [L], null when not kept; one per group of layers when the policy shares scores.
  std::vector<std::unique_ptr<kernels::ScoreBuffer>> layer_scores_;
  std::unique_ptr<kernels::ScoreBuffer> spare_scores_;     // [score_rows, T]
  std::unique_ptr<kernels::ScoreBuffer> merged_scores_;    // [1, T]
  std::unique_ptr<kernels::ScoreBuffer> sequence_scores_;  // [1, T]
  OperationResult result_;
  std::unique_ptr<OperationImpl> shadow_;
  absl::Status shadow_status_;
};

absl::StatusOr<Plan> MakePlan(OperationSpec spec, const PolicyRegistry& policies,
                              kernels::ComputeBackend& backend) {
  Plan plan;
  plan.spec = std::move(spec);
  KEEPSET_ASSIGN_OR_RETURN(const Scope native_scope, policies.NativeScope(plan.spec.policy));
  PolicyParameters parameters(plan.spec.policy, plan.spec.parameters);
  KEEPSET_ASSIGN_OR_RETURN(plan.policy, policies.New(plan.spec.policy, parameters));
  KEEPSET_ASSIGN_OR_RETURN(plan.cut_options,
                           ReadCutOptions(parameters, native_scope, *plan.policy));
  KEEPSET_RETURN_IF_ERROR(parameters.RefuseUnknown());
  plan.needs = plan.policy->requirements();
  KEEPSET_RETURN_IF_ERROR(CheckShape(plan.spec, plan.needs));
  KEEPSET_ASSIGN_OR_RETURN(plan.row_positions, ResolveRowPositions(plan.spec, plan.needs));
  KEEPSET_ASSIGN_OR_RETURN(plan.ppl, ResolvePerplexity(plan.spec));
  if (plan.needs.ppl && !plan.ppl.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("policy ", plan.spec.policy, ": missing ppl, want ppl or window_logprobs"));
  }
  KEEPSET_RETURN_IF_ERROR(CheckTable(plan.spec, plan.needs));
  plan.scope =
      plan.spec.scope.value_or(plan.policy->native_scope(plan.spec).value_or(native_scope));
  if (plan.policy->keeps_everything() && plan.spec.budget.kind == Budget::Kind::kTableDefault) {
    plan.budget_tokens = plan.spec.seq_len;
  } else {
    KEEPSET_ASSIGN_OR_RETURN(
        plan.budget_tokens,
        ResolveBudget(plan.spec, plan.needs.table_kind.empty() ? nullptr : plan.spec.table.get()));
  }
  KEEPSET_ASSIGN_OR_RETURN(plan.protected_ranges, ProtectedRanges(plan.spec));
  const int64_t protected_count = CountPositions(plan.protected_ranges);
  if (!plan.policy->keeps_everything() && protected_count > plan.budget_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(protected_count,
                                                   " protected positions, want at most the budget "
                                                   "of ",
                                                   plan.budget_tokens));
  }
  KEEPSET_ASSIGN_OR_RETURN(plan.op_context, backend.NewContext());
  return plan;
}

// The same question to the other table: no deadline, nobody waits for it.
absl::StatusOr<std::unique_ptr<OperationImpl>> MakeShadow(const OperationSpec& spec,
                                                          const PolicyRegistry& policies,
                                                          kernels::ComputeBackend& backend,
                                                          const Clock& clock) {
  OperationSpec shadow = spec;
  shadow.table = std::move(shadow.shadow_table);
  shadow.shadow_table = nullptr;
  shadow.mode = Mode::kShadow;
  shadow.deadline = absl::InfiniteDuration();
  KEEPSET_ASSIGN_OR_RETURN(Plan plan, MakePlan(std::move(shadow), policies, backend));
  return std::make_unique<OperationImpl>(std::move(plan), backend, clock);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Operation>> Operation::Begin(OperationSpec spec,
                                                            const PolicyRegistry& policies,
                                                            kernels::ComputeBackend& backend,
                                                            const Clock& clock) {
  if (const absl::Status health = backend.Health(); !health.ok()) {
    return absl::UnavailableError(
        absl::StrCat("backend ", backend.name(), " waits to be restarted: ", health.message()));
  }
  KEEPSET_ASSIGN_OR_RETURN(Plan plan, MakePlan(std::move(spec), policies, backend));
  auto operation = std::make_unique<OperationImpl>(std::move(plan), backend, clock);
  KEEPSET_RETURN_IF_ERROR(operation->BeginPolicy());
  if (operation->spec().shadow_table != nullptr) {
    operation->AttachShadow(MakeShadow(operation->spec(), policies, backend, clock));
  }
  return operation;
}

}  // namespace keepset::engine
