// Plain data of one operation: what a caller asks (OperationSpec), what a layer brings
// (LayerObservation), what comes back (OperationResult). No behaviour, no ownership of tensors.
#ifndef KEEPSET_ENGINE_OPERATION_TYPES_H_
#define KEEPSET_ENGINE_OPERATION_TYPES_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kernels/views.h"
#include "tables/decision_table.h"
#include "tables/model_fingerprint.h"

namespace keepset::engine {

// Which positions may differ from which (design.md 3).
enum class Scope {
  kLayerElastic,  // each layer its own count
  kLayerEqual,    // same count in every layer, own positions
  kSequence,      // one set for all layers
  kKvHead,        // one set per KV head
};

enum class Mode {
  kDecide,
  kShadow,  // decided and reported, never applied: Gather is refused
};

// What becomes of an operation that the backend has no memory for.
enum class OnShortMemory {
  kFail,      // ResourceExhausted
  kKeepFull,  // outcome kept_full, reason shed
};

enum class Outcome { kCompressed, kKeptFull, kShadow };

// Why an outcome is what it is; kNone for an ordinary compression and for policy `full`.
enum class Reason { kNone, kBelowBudget, kNoSaving, kShed, kDeadline, kDeviceFault };

struct Budget {
  enum class Kind {
    kTableDefault,
    kTokens,        // positions per layer (per KV head in scope kv_head)
    kKeptFraction,  // floor(T * fraction) in double, at least 1
    kBytes,         // bytes per layer, divided by the bytes of one token over all KV heads
  };
  Kind kind = Kind::kTableDefault;
  int64_t tokens = 0;
  double kept_fraction = 0.0;
  int64_t bytes = 0;
};

struct ProtectedSpan {
  std::string name;
  int64_t begin = 0;
  int64_t end = 0;  // exclusive
};

struct OperationSpec {
  tables::ModelFingerprint model;  // Layer and head counts and head_dim of every observation.
  int64_t seq_len = 0;             // T
  // Observed rows W of every layer. Empty row_positions: the last W positions.
  int64_t num_rows = 0;
  std::vector<int64_t> row_positions;  // [W] ascending, < T
  float softmax_scale = 0.0f;          // > 0 when queries are observed
  kernels::DType kv_dtype = kernels::DType::kF32;
  int64_t value_head_dim = 0;  // 0: head_dim

  std::string policy;
  std::map<std::string, std::string> parameters;
  Budget budget;
  std::optional<Scope> scope;  // absent: the policy's native scope

  int64_t protect_sink = 0;    // first positions
  int64_t protect_window = 0;  // last positions
  std::vector<ProtectedSpan> protect_spans;

  // Perplexity of the last W tokens; wins over window_logprobs (natural log, one per token).
  std::optional<double> ppl;
  std::vector<float> window_logprobs;

  // The table of this operation, already resolved; held until the operation ends.
  std::shared_ptr<const tables::DecisionTable> table;

  // Asked too, from the same observations, and never applied (engine/shadow.h); nullptr: none.
  std::shared_ptr<const tables::DecisionTable> shadow_table;

  // A cudaStream_t on which the operation's kernels are queued, alive and not in capture until the
  // operation is gone; nullptr: one of the backend's own.
  void* device_stream = nullptr;

  OnShortMemory on_short_memory = OnShortMemory::kFail;
  Mode mode = Mode::kDecide;
  // Monotonic time (Clock::Monotonic) after which the operation answers kept_full, reason deadline.
  absl::Duration deadline = absl::InfiniteDuration();
};

// What column statistics hold of the attention of the W observed rows.
enum class ColumnReduction {
  kMean,  // sum over the rows divided by W
  kSum,
};

// What one layer brings. Views stay valid until Observe returns.
struct LayerObservation {
  // Ascending query heads that q_window, window_lse and attn_tile hold, for policies that read some
  // heads alone (Requirements::some_heads); empty: all H.
  absl::Span<const int64_t> qo_heads;
  kernels::QueryView q_window;  // [H, W, d]
  kernels::LseView window_lse;  // [H, W], optional beside q_window
  kernels::TileView attn_tile;  // [H, W, T]; wins over q_window
  // [H, T], instead of queries and tile. Positions behind the last observed row are not read.
  kernels::ColumnsView column_stats;
  ColumnReduction column_reduction = ColumnReduction::kMean;
  kernels::KvView k;  // [Hkv, T, d]
  kernels::KvView v;  // [Hkv, T, dv]
};

// An observation and the layer that it is of.
struct ObservedLayer {
  int64_t layer = 0;
  LayerObservation observation;
};

// Where the kept rows of a layer are and where they go.
struct LayerGather {
  int64_t layer = 0;
  kernels::KvView k;
  kernels::KvView v;
  kernels::MutableKvView out_k;
  kernels::MutableKvView out_v;
};

// K and V of a layer that are compacted where they lie.
struct LayerInPlace {
  int64_t layer = 0;
  kernels::MutableKvView k;
  kernels::MutableKvView v;
};

// What a worker has to send for one operation.
struct LayerInputNeeds {
  int64_t layer = 0;
  bool queries = false;  // q_window (or attn_tile)
  bool keys = false;
  bool values = false;
  bool columns = false;  // column_stats serve instead of queries and keys
  // Heads that are read; empty: all.
  std::vector<int64_t> qo_heads;
  std::vector<int64_t> kv_heads;
};
struct InputNeeds {
  std::vector<LayerInputNeeds> layers;  // ascending; others may be left out
  // The last rows of the observed ones that are read, and the most that column_stats may stand for;
  // 0: all of them.
  int64_t max_rows = 0;
  bool ppl = false;
  bool last_row = false;       // the last row of the prompt observes
  bool observed_rows = false;  // rows that the request chooses observe
  bool probe_rows = false;     // rows of the probe observe
  std::string probe_name;
  std::string probe_text;
};

struct LayerResult {
  // One ascending set, or one per KV head in scope kv_head.
  std::vector<std::vector<int32_t>> keep_indices;
  // Parallel to keep_indices; candidates counts every position with score >= tau, protected or not.
  std::vector<int64_t> candidates;
  std::vector<int64_t> filled;
  std::optional<double> tau;
  // alpha_scope layer or head only.
  std::optional<double> entropy;
  std::optional<int64_t> entropy_bin;
};

// Inputs a policy may go on without when the request allows it; the result names those that were.
enum class DefaultedInput { kPpl };
inline constexpr DefaultedInput kDefaultedInputs[] = {DefaultedInput::kPpl};

struct StageTimes {
  absl::Duration score;
  absl::Duration select;
  absl::Duration gather;
};

struct OperationResult {
  Outcome outcome = Outcome::kCompressed;
  Reason reason = Reason::kNone;
  std::string policy;
  Scope scope = Scope::kLayerEqual;
  int64_t seq_len = 0;
  int64_t budget_tokens = 0;  // as requested, before the clamp to T
  std::optional<tables::TableIdentity> table;
  std::string table_source;  // provenance of the table, empty without one
  std::optional<double> entropy;
  std::optional<double> ppl;
  std::optional<int64_t> entropy_bin;
  std::optional<int64_t> ppl_bin;
  // Share of the score outside the cut, and the miss rate a table's calibration predicts for it.
  std::optional<double> outside_mass;
  std::optional<double> predicted_miss_rate;
  bool has_candidates = false;  // the policy has a threshold, so candidates and tau mean something
  std::vector<LayerResult> layers;  // [L]; kept_full lists all positions
  std::vector<std::string> defaulted_inputs;
  std::vector<std::string> relaxed;
  std::string backend;
  int64_t bytes_before = 0;  // K and V of all layers
  int64_t bytes_after = 0;
  StageTimes times;
};

// Names of formats.md: "layer_elastic", "kept_full", "below_budget" ...
absl::string_view ScopeName(Scope scope);
absl::string_view OutcomeName(Outcome outcome);
absl::string_view ReasonName(Reason reason);
absl::string_view DefaultedInputName(DefaultedInput input);  // "ppl"
// InvalidArgument lists the known scopes.
absl::StatusOr<Scope> ParseScope(absl::string_view name);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_OPERATION_TYPES_H_
