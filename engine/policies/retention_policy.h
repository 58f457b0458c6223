// One retention policy for one operation.
//
// A policy turns observations into scores; everything else is inherited from the operation: the
// loop over layers, merging heads and layers for the asked scope, dilation, protected ranges, the
// cut, equal counts, ascending order. A policy that only ranks tokens, layer by layer, is a
// LayerwisePolicy. Not thread-safe: an operation calls its policy from one thread at a time.
#ifndef KEEPSET_ENGINE_POLICIES_RETENTION_POLICY_H_
#define KEEPSET_ENGINE_POLICIES_RETENTION_POLICY_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "engine/operation_types.h"
#include "engine/policies/policy_parameters.h"
#include "kernels/compute_backend.h"
#include "tables/decision_table.h"

namespace keepset::engine {

// What a policy needs; a missing input is refused before any work.
struct Requirements {
  bool observation = false;           // q_window with k, or attn_tile
  bool columns = false;               // column_stats serve as the observation
  int64_t max_rows = 0;               // of the observed rows the last ones are read; 0: all
  bool keys = false;                  // k even when a tile is given
  bool values = false;                // v
  bool ppl = false;                   // perplexity or window_logprobs
  bool some_heads = false;            // qo_heads of an observation may leave heads out
  bool probe_rows = false;            // row_positions may lie behind the prompt (rows of a probe)
  absl::string_view table_kind = {};  // empty: no table
};

// How scores are to be read.
enum class ScoreKind {
  kRanking,    // only the order counts: the budget is filled
  kThreshold,  // positions below tau are dropped although the budget has room
};

// When scores are final.
enum class Locality {
  kLayer,   // after Score of that layer: the operation may answer while streaming
  kGlobal,  // after FinishScores
  kShared,  // after FinishScores; a group of layers shares one row of scores
};

// What every call of a policy sees. Lives as long as the operation.
struct PolicyContext {
  const OperationSpec& spec;
  kernels::ComputeBackend& backend;
  kernels::OpContext& op_context;
  Scope scope;
  int64_t budget_tokens = 0;                // as requested, before the clamp to T
  absl::Span<const int64_t> row_positions;  // [W]
  std::optional<double> ppl;                // from spec.ppl or spec.window_logprobs
  absl::Span<const kernels::SelectArgs::Range> protected_ranges = {};
  int64_t dilate = 0;  // of the request: final scores are dilated before they are cut
};

struct LayerVerdict {
  float tau = -std::numeric_limits<float>::infinity();
  std::optional<double> entropy;
  std::optional<int64_t> entropy_bin;
};

// What a policy adds to the result.
struct PolicyDiagnostics {
  std::optional<double> entropy;
  std::optional<double> ppl;
  std::optional<int64_t> entropy_bin;
  std::optional<int64_t> ppl_bin;
  std::vector<DefaultedInput> defaulted_inputs;
  std::vector<std::string> relaxed;
  std::optional<double> outside_mass;
  std::optional<double> predicted_miss_rate;
};

class RetentionPolicy {
 public:
  virtual ~RetentionPolicy() = default;

  virtual Requirements requirements() const = 0;
  virtual ScoreKind score_kind() const { return ScoreKind::kRanking; }
  virtual Locality locality() const { return Locality::kLayer; }
  // What a worker must send for `spec`, of which model, seq_len, parameters and table are looked
  // at.
  virtual absl::StatusOr<InputNeeds> Needs(const OperationSpec& spec) const;
  // Scope of a request that names none, where it depends on the table.
  virtual std::optional<Scope> native_scope(const OperationSpec& /*spec*/) const {
    return std::nullopt;
  }
  // After Begin: what this layer must bring, at most requirements(). A layer that is not needed may
  // be left out, and nothing of it is asked for when it comes.
  virtual bool NeedsLayer(int64_t /*layer*/) const { return true; }
  virtual Requirements layer_requirements(int64_t /*layer*/) const { return requirements(); }
  // kShared only: layers of one group share scores; groups are counted from 0.
  virtual int64_t num_layer_groups() const { return 1; }
  virtual int64_t LayerGroup(int64_t /*layer*/) const { return 0; }
  // kShared only, after FinishScores: positions to keep per set where the policy chooses how many;
  // `limit` is the budget.
  virtual int64_t ChosenLimit(int64_t limit) const { return limit; }
  // Keeps everything by definition (`full`): no observation is looked at.
  virtual bool keeps_everything() const { return false; }
  // Whether tau applies although the budget covers the whole prompt (`gate_below_budget`).
  virtual bool applies_below_budget() const { return false; }
  // Rows of the score buffer the policy writes: num_kv_heads, or 1 when heads share one score.
  virtual int64_t score_rows(const PolicyContext& context) const = 0;

  // Makes this policy score from the tensors `decider` has worked out: the same policy with the
  // same parameters under another table, which has begun, scores the layers of every call first and
  // whose ops are waited for. Called before Begin. kAlone: it does not share, and observes for
  // itself.
  enum class Sharing { kAlone, kShared };
  virtual Sharing ShareStages(const RetentionPolicy& /*decider*/) { return Sharing::kAlone; }

  // Called once before the first layer: checks table and signals, sizes buffers.
  virtual absl::Status Begin(PolicyContext& context) = 0;

  // Writes the scores of layers[i] to scores[i]: [score_rows, T], higher is better. Layers come in
  // ascending order, several in one call where the backend gains by it; their scores are those of
  // one call per layer. Layers that are refused here, or by the wait that follows, leave no trace
  // and may come again. kShared: scores[i] [1, T] are those of the layer's group; Commit adds to
  // them.
  virtual absl::Status Score(PolicyContext& context, absl::Span<const ObservedLayer> layers,
                             absl::Span<kernels::ScoreBuffer* const> scores) = 0;

  // Once for the layers of every Score that was waited for without an error: what they add to other
  // layers' scores, and what only the host can work out. The observations' tensors are not read.
  // kShared: the group's scores are zero at first.
  virtual absl::Status Commit(PolicyContext& /*context*/,
                              absl::Span<const ObservedLayer> /*layers*/,
                              absl::Span<kernels::ScoreBuffer* const> /*scores*/) {
    return absl::OkStatus();
  }

  // kGlobal: completes every layer's scores in place after the last layer. kShared: every group's.
  virtual absl::Status FinishScores(PolicyContext& /*context*/,
                                    absl::Span<kernels::ScoreBuffer* const> /*scores*/) {
    return absl::OkStatus();
  }

  // Threshold and per-layer diagnostics; final scores are known.
  virtual LayerVerdict Verdict(int64_t /*layer*/) const { return {}; }

  // Positions the definition keeps whatever their score, ascending and disjoint; when the budget
  // does not hold them all, the most recent ones stay.
  virtual std::vector<kernels::SelectArgs::Range> ForcedRanges(
      const PolicyContext& /*context*/) const {
    return {};
  }
  virtual int64_t min_kept() const { return 1; }

  virtual PolicyDiagnostics diagnostics() const { return {}; }
};

// A policy that scores one layer after the other.
class LayerwisePolicy : public RetentionPolicy {
 public:
  absl::Status Score(PolicyContext& context, absl::Span<const ObservedLayer> layers,
                     absl::Span<kernels::ScoreBuffer* const> scores) final {
    for (size_t i = 0; i < layers.size(); ++i) {
      absl::Status status = ScoreLayer(context, layers[i].layer, layers[i].observation, *scores[i]);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

 protected:
  // Score of one layer.
  virtual absl::Status ScoreLayer(PolicyContext& context, int64_t layer,
                                  const LayerObservation& observation,
                                  kernels::ScoreBuffer& scores) = 0;
};

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_POLICIES_RETENTION_POLICY_H_
