#include "engine/operation.h"

#include <algorithm>
#include <new>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/budget.h"
#include "engine/keep_set_builder.h"
#include "engine/kept_rows.h"
#include "engine/operation_plan.h"
#include "engine/spec_check.h"

namespace keepset::engine {
namespace {

// Columns [H, T] of the layers that are observed together: 128 MiB of scores, all layers of 32
// query heads and 32k tokens. More layers than that wait for their turn.
constexpr int64_t kMostColumnsAtOnce = int64_t{1} << 25;

class OperationImpl final : public Operation {
 public:
  OperationImpl(OperationPlan plan, kernels::ComputeBackend& backend, const Clock& clock)
      : plan_(std::move(plan)),
        backend_(backend),
        clock_(clock),
        builder_(plan_, backend_, clock_) {}

  absl::Status BeginPolicy() {
    const absl::Status begun = builder_.Begin();
    if (!KeepsFullFor(begun)) KEEPSET_RETURN_IF_ERROR(begun);
    keeps_all_ = policy().keeps_everything() ||
                 (plan_.budget_tokens >= seq_len() && !policy().applies_below_budget());
    return absl::OkStatus();
  }

  const OperationSpec& spec() const override { return plan_.spec; }

  absl::Status Observe(int64_t layer, const LayerObservation& observation) override {
    KEEPSET_RETURN_IF_ERROR(PassUnread(std::min(layer, num_layers())));
    KEEPSET_RETURN_IF_ERROR(CheckLayer(next_layer_, layer, observation));
    if (policy().NeedsLayer(layer) && !keeps_all_ && !DeadlinePassed() && DeviceWorks() &&
        !short_of_memory_) {
      const ObservedLayer observed = {layer, observation};
      absl::Status status = builder_.Score(absl::MakeConstSpan(&observed, 1));
      if (absl::IsResourceExhausted(status) && shadow_ != nullptr) {
        // What is asked beside the operation takes nothing from it.
        DropShadow(status);
        status = builder_.Score(absl::MakeConstSpan(&observed, 1));
      }
      // A layer that a broken device could not score is no fault of the caller.
      if (!status.ok() && DeviceWorks() && !KeepsFullFor(status)) return status;
      if (status.ok()) ObserveShadow(absl::MakeConstSpan(&observed, 1));
    }
    next_layer_ = layer + 1;
    return absl::OkStatus();
  }

  absl::Status ObserveLayers(absl::Span<const ObservedLayer> layers) override {
    const auto most = static_cast<size_t>(layers_at_once());
    for (size_t begin = 0; begin < layers.size(); begin += most) {
      const absl::Span<const ObservedLayer> some = layers.subspan(begin, most);
      if (some.size() > 1 && ObserveTogether(some)) continue;
      for (const ObservedLayer& one : some) {
        KEEPSET_RETURN_IF_ERROR(Observe(one.layer, one.observation));
      }
    }
    return absl::OkStatus();
  }

  int64_t layers_at_once() const override {
    if (keeps_all_) return 1;
    const int64_t columns = spec().model.num_qo_heads * seq_len();
    return std::clamp<int64_t>(kMostColumnsAtOnce / columns, 1, backend_.layers_at_once());
  }

  const LayerResult* EarlyResult(int64_t layer) const override {
    if (finished_ || short_of_memory_ || layer < 0 || layer >= next_layer_) return nullptr;
    const std::optional<LayerResult>& result = builder_.layer_result(layer);
    return result.has_value() ? &*result : nullptr;
  }

  absl::StatusOr<const OperationResult*> Finish() override {
    if (finished_) return &result_;
    KEEPSET_RETURN_IF_ERROR(PassUnread(num_layers()));
    if (const int64_t next = NeededLayerFrom(next_layer_); next < num_layers()) {
      return absl::FailedPreconditionError(absl::StrCat("layer ", next,
                                                        ": not observed, want layers ", next, "..",
                                                        num_layers() - 1, " before Finish"));
    }
    KEEPSET_RETURN_IF_ERROR(finish_status_);
    if (keeps_all_) {
      return &FinishKeptFull(policy().keeps_everything() ? Reason::kNone : Reason::kBelowBudget);
    }
    if (!DeviceWorks()) return &FinishKeptFull(Reason::kDeviceFault);
    if (short_of_memory_) return &FinishKeptFull(Reason::kShed);
    if (DeadlinePassed()) return &FinishKeptFull(Reason::kDeadline);
    finish_status_ = builder_.Finish();
    if (!finish_status_.ok() && !DeviceWorks()) {
      finish_status_ = absl::OkStatus();
      return &FinishKeptFull(Reason::kDeviceFault);
    }
    if (KeepsFullFor(finish_status_)) {
      finish_status_ = absl::OkStatus();
      return &FinishKeptFull(Reason::kShed);
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
    shadow_shares_ = shadow_->policy().ShareStages(policy()) == RetentionPolicy::Sharing::kShared;
    shadow_status_ = shadow_->BeginPolicy();
    if (!shadow_status_.ok()) shadow_.reset();
  }

  const OperationResult& FinishKeptFull(Reason reason) override {
    // A device that fails in the gather, or has no memory for it, takes back what was decided. Rows
    // that have moved in place are not to be taken back.
    const bool takes_back = !has_moved_in_place_ && (reason == Reason::kDeviceFault ||
                                                     (reason == Reason::kShed && short_of_memory_));
    if (finished_ && !takes_back) return result_;
    // First of all: without memory for it the result stays as it was.
    std::vector<int32_t> everything(seq_len());
    std::iota(everything.begin(), everything.end(), 0);
    const int64_t sets = plan_.scope == Scope::kKvHead ? spec().model.num_kv_heads : 1;
    LayerResult full;
    full.keep_indices.assign(sets, everything);
    full.candidates.assign(sets, 0);
    full.filled.assign(sets, 0);
    std::vector<LayerResult> layers(num_layers(), full);
    // A caller of keepset.h may still read it.
    if (finished_) superseded_.push_back(std::move(result_.layers));
    OperationResult kept_full;
    kept_full.layers = std::move(layers);
    kept_full.times.gather = result_.times.gather;
    result_ = std::move(kept_full);
    result_.outcome = spec().mode == Mode::kShadow ? Outcome::kShadow : Outcome::kKeptFull;
    result_.reason = reason;
    Describe();
    // Nothing lies outside of everything.
    result_.outside_mass.reset();
    result_.predicted_miss_rate.reset();
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
    const LayerGather one = {layer, k, v, out_k, out_v};
    return GatherLayers(absl::MakeConstSpan(&one, 1));
  }

  absl::Status GatherLayers(absl::Span<const LayerGather> layers) override {
    const absl::Duration start = clock_.Monotonic();
    for (const LayerGather& one : layers) KEEPSET_RETURN_IF_ERROR(CheckGatherMode(one.layer));
    const absl::Status gathered = Caught([&] { return kept_rows_.Gather(layers); });
    KeepsFullFor(gathered);
    KEEPSET_RETURN_IF_ERROR(gathered);
    result_.times.gather += clock_.Monotonic() - start;
    return absl::OkStatus();
  }

  bool is_short_of_memory() const override { return short_of_memory_; }

  absl::Status ReserveInPlace(absl::Span<const LayerInPlace> layers) override {
    KEEPSET_RETURN_IF_ERROR(CheckInPlace(layers));
    if (result_.outcome == Outcome::kKeptFull) return absl::OkStatus();
    return Reserve(layers);
  }

  absl::Status GatherInPlace(int64_t layer, const kernels::MutableKvView& k,
                             const kernels::MutableKvView& v) override {
    const LayerInPlace one = {layer, k, v};
    KEEPSET_RETURN_IF_ERROR(CheckInPlace(absl::MakeConstSpan(&one, 1)));
    // Whole already.
    if (result_.outcome == Outcome::kKeptFull) return absl::OkStatus();
    const absl::Duration start = clock_.Monotonic();
    // Before K has moved, whatever V needs.
    KEEPSET_RETURN_IF_ERROR(Reserve(absl::MakeConstSpan(&one, 1)));
    has_moved_in_place_ = true;
    KEEPSET_RETURN_IF_ERROR(kept_rows_.MoveInPlace(one));
    result_.times.gather += clock_.Monotonic() - start;
    return absl::OkStatus();
  }

 private:
  RetentionPolicy& policy() const { return *plan_.policy; }
  int64_t num_layers() const { return plan_.spec.model.num_layers; }
  int64_t seq_len() const { return plan_.spec.seq_len; }

  // Layers before `end` of which the policy reads nothing come without being handed over.
  absl::Status PassUnread(int64_t end) {
    while (!finished_ && next_layer_ < end) {
      const Requirements needs = policy().layer_requirements(next_layer_);
      if (needs.observation || needs.keys || needs.values) break;
      KEEPSET_RETURN_IF_ERROR(Observe(next_layer_, {}));
    }
    return absl::OkStatus();
  }

  // Whether `layer` may be the next one after `next` layers.
  absl::Status CheckLayer(int64_t next, int64_t layer, const LayerObservation& observation) const {
    if (finished_) {
      return absl::FailedPreconditionError(
          absl::StrCat("layer ", layer, ": the operation is finished"));
    }
    if (next == num_layers()) {
      return absl::InvalidArgumentError(absl::StrCat("layer ", layer, ": all ", num_layers(),
                                                     " layers were observed, want Finish"));
    }
    if (layer < next || layer > NeededLayerFrom(next)) {
      return absl::InvalidArgumentError(
          absl::StrCat("layer ", layer, ": out of order, want layer ", NeededLayerFrom(next)));
    }
    const bool needed = policy().NeedsLayer(layer);
    return CheckObservation(spec(), needed ? policy().layer_requirements(layer) : Requirements(),
                            layer, observation);
  }

  // False when anything is wrong with any of them: nothing is observed then, and one by one they
  // tell which it is.
  bool ObserveTogether(absl::Span<const ObservedLayer> layers) {
    if (DeadlinePassed() || !DeviceWorks() || short_of_memory_) return false;
    const absl::StatusOr<std::vector<ObservedLayer>> scored = ScoreTogether(layers);
    if (absl::IsResourceExhausted(scored.status())) {
      // Buffers of the attempt return to the backend with a wait. What it finds, the next one
      // finds.
      backend_.Wait(*plan_.op_context).IgnoreError();
    }
    if (!scored.ok()) return false;
    if (!scored->empty()) ObserveShadow(*scored);
    return true;
  }

  // Scores those of the layers that the policy needs in one call, and returns them. On an error
  // nothing is observed.
  absl::StatusOr<std::vector<ObservedLayer>> ScoreTogether(absl::Span<const ObservedLayer> layers) {
    std::vector<ObservedLayer> needed;
    int64_t next = next_layer_;
    for (const ObservedLayer& one : layers) {
      KEEPSET_RETURN_IF_ERROR(CheckLayer(next, one.layer, one.observation));
      if (policy().NeedsLayer(one.layer) && !keeps_all_) needed.push_back(one);
      next = one.layer + 1;
    }
    if (!needed.empty()) KEEPSET_RETURN_IF_ERROR(builder_.Score(needed));
    next_layer_ = next;
    return needed;
  }

  // The first layer from `layer` on that cannot be left out.
  int64_t NeededLayerFrom(int64_t layer) const {
    while (layer < num_layers() && !policy().NeedsLayer(layer)) ++layer;
    return layer;
  }

  // Once passed, it stays passed: no later layer is scored and Finish keeps everything.
  bool DeadlinePassed() {
    deadline_passed_ = deadline_passed_ || clock_.Monotonic() >= spec().deadline;
    return deadline_passed_;
  }

  // Remembers that memory is short where that ends the operation as kept_full.
  bool KeepsFullFor(const absl::Status& status) {
    if (spec().on_short_memory != OnShortMemory::kKeepFull) return false;
    if (!absl::IsResourceExhausted(status)) return false;
    short_of_memory_ = true;
    return true;
  }

  // What `call` throws for want of memory is a status: it says whether the cache is whole.
  template <typename Call>
  static absl::Status Caught(const Call& call) {
    try {
      return call();
    } catch (const std::bad_alloc&) {
      return absl::ResourceExhaustedError("gather: out of memory");
    }
  }

  absl::Status Reserve(absl::Span<const LayerInPlace> layers) {
    absl::Status reserved = Caught([&] { return kept_rows_.ReserveInPlace(layers); });
    KeepsFullFor(reserved);
    return reserved;
  }

  bool DeviceWorks() const { return backend_.Health().ok(); }

  // Layers that this operation has just scored in one call. A shadow that scores from what was
  // worked out of them takes the same ones in one call, too, or none.
  void ObserveShadow(absl::Span<const ObservedLayer> layers) {
    if (shadow_ == nullptr) return;
    try {
      shadow_status_ =
          shadow_shares_ ? shadow_->ScoreTogether(layers).status() : shadow_->ObserveLayers(layers);
    } catch (const std::bad_alloc&) {
      shadow_status_ = absl::ResourceExhaustedError(absl::StrCat(
          "layer ", layers.front().layer, ": no memory for the scores of the shadow table"));
    }
    if (!shadow_status_.ok()) shadow_.reset();
  }

  // Its buffers return to the backend.
  void DropShadow(absl::Status why) {
    shadow_.reset();
    shadow_status_ = std::move(why);
    backend_.Wait(*plan_.op_context).IgnoreError();
  }

  void FillResult() {
    result_.layers = builder_.TakeLayerResults();
    bool everything = true;
    for (const LayerResult& layer : result_.layers) {
      for (const std::vector<int32_t>& set : layer.keep_indices) {
        everything = everything && static_cast<int64_t>(set.size()) == seq_len();
      }
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
    result_.backend = backend_.NameFor(*plan_.op_context);
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
    result_.times.score = builder_.times().score;
    result_.times.select = builder_.times().select;
    finished_ = true;
    builder_.Clear();
  }

  absl::Status CheckGatherLayer(int64_t layer) const {
    if (!finished_) return absl::FailedPreconditionError("gather: the operation is not finished");
    if (layer < 0 || layer >= num_layers()) {
      return absl::InvalidArgumentError(
          absl::StrCat("gather: layer ", layer, ", want 0..", num_layers() - 1));
    }
    return absl::OkStatus();
  }

  absl::Status CheckGatherMode(int64_t layer) const {
    KEEPSET_RETURN_IF_ERROR(CheckGatherLayer(layer));
    if (spec().mode == Mode::kDecide) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat("layer ", layer, ": a shadow operation is never applied, nothing to gather"));
  }

  absl::Status CheckInPlace(absl::Span<const LayerInPlace> layers) const {
    for (const LayerInPlace& one : layers) {
      KEEPSET_RETURN_IF_ERROR(CheckGatherMode(one.layer));
      KEEPSET_RETURN_IF_ERROR(kept_rows_.CheckInPlace(one));
    }
    return absl::OkStatus();
  }

  const OperationPlan plan_;
  kernels::ComputeBackend& backend_;
  const Clock& clock_;
  KeepSetBuilder builder_;
  bool keeps_all_ = false;
  bool deadline_passed_ = false;
  bool short_of_memory_ = false;
  bool finished_ = false;
  bool has_moved_in_place_ = false;
  absl::Status finish_status_;
  int64_t next_layer_ = 0;
  OperationResult result_;
  std::vector<std::vector<LayerResult>> superseded_;  // of results that were taken back
  const KeptRows kept_rows_{plan_, result_.layers, backend_};
  std::unique_ptr<OperationImpl> shadow_;
  bool shadow_shares_ = false;  // what is worked out of the layers of one call
  absl::Status shadow_status_;
};

// The same question to the other table: no deadline, nobody waits for it.
absl::StatusOr<std::unique_ptr<OperationImpl>> MakeShadow(const OperationSpec& spec,
                                                          const PolicyRegistry& policies,
                                                          kernels::ComputeBackend& backend,
                                                          const Clock& clock) {
  OperationSpec shadow = spec;
  shadow.table = std::move(shadow.shadow_table);
  shadow.shadow_table = nullptr;
  shadow.mode = Mode::kShadow;
  // It may be asked when the caller's stream is gone, and reads nothing that is still queued there:
  // the layers it observes have been scored.
  shadow.device_stream = nullptr;
  shadow.on_short_memory = OnShortMemory::kFail;
  shadow.deadline = absl::InfiniteDuration();
  KEEPSET_ASSIGN_OR_RETURN(OperationPlan plan, PlanOperation(std::move(shadow), policies, backend));
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
  KEEPSET_ASSIGN_OR_RETURN(OperationPlan plan, PlanOperation(std::move(spec), policies, backend));
  auto operation = std::make_unique<OperationImpl>(std::move(plan), backend, clock);
  KEEPSET_RETURN_IF_ERROR(operation->BeginPolicy());
  if (operation->spec().shadow_table != nullptr) {
    operation->AttachShadow(MakeShadow(operation->spec(), policies, backend, clock));
  }
  return operation;
}

}  // namespace keepset::engine
