// One retention policy for one operation.
//
// A policy turns observations into scores; everything else is inherited from the operation: the
// loop over layers, merging heads and layers for the asked scope, dilation, protected ranges, the
// cut, equal counts, ascending order. A policy that only ranks tokens overrides Score. Not
// thread-safe: an operation calls its policy from one thread at a time.
#ifndef KEEPSET_ENGINE_POLICIES_RETENTION_POLICY_H_
#define KEEPSET_ENGINE_POLICIES_RETENTION_POLICY_H_

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
  bool keys = false;                  // k even when a tile is given
  bool values = false;                // v
  bool ppl = false;                   // perplexity or window_logprobs
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
};

class RetentionPolicy {
 public:
  virtual ~RetentionPolicy() = default;

  virtual Requirements requirements() const = 0;
  virtual ScoreKind score_kind() const { return ScoreKind::kRanking; }
  virtual Locality locality() const { return Locality::kLayer; }
  // Keeps everything by definition (`full`): no observation is looked at.
  virtual bool keeps_everything() const { return false; }
  // Whether tau applies although the budget covers the whole prompt (`gate_below_budget`).
  virtual bool applies_below_budget() const { return false; }
  // Rows of the score buffer the policy writes: num_kv_heads, or 1 when heads share one score.
  virtual int64_t score_rows(const PolicyContext& context) const = 0;

  // Called once before the first layer: checks table and signals, sizes buffers.
  virtual absl::Status Begin(PolicyContext& context) = 0;

  // Writes the scores of one layer: [score_rows, T], higher is better. Layers come in ascending
  // order.
  virtual absl::Status Score(PolicyContext& context, int64_t layer,
                             const LayerObservation& observation, kernels::ScoreBuffer& scores) = 0;

  // kGlobal only: completes every layer's scores in place after the last layer.
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

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_POLICIES_RETENTION_POLICY_H_
