// Plain data of one operation as a worker sees it: what it asks, what a layer brings, what comes
// back. Tensors are borrowed; a tensor that lies in a registered region travels as a slice of it,
// any other one inside the message.
#ifndef KEEPSET_CLIENTS_CPP_OPERATION_H_
#define KEEPSET_CLIENTS_CPP_OPERATION_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace keepset::client {

enum class DType { kF32 = 1, kF16 = 2, kBF16 = 3 };
int64_t DTypeBytes(DType dtype);

enum class Scope { kNative, kLayerElastic, kLayerEqual, kSequence, kKvHead };
enum class Outcome { kCompressed, kKeptFull, kShadow };
enum class Reason { kNone, kBelowBudget, kNoSaving, kShed, kDeadline, kDeviceFault };
enum class Mode { kDecide, kShadow };
enum class GatherMode {
  kNone,
  kInline,       // compacted K and V come back inside the reply
  kDestination,  // they are written into LayerInput::destination
  // They move to the front of LayerInput::k and v themselves, in regions registered read-write.
  // After absl::DataLossError, and after an operation that was sent whole and not answered, the
  // cache of this prompt is lost.
  kInPlace,
};

// "layer_elastic", "kept_full", "below_budget"; kNative is "".
absl::string_view ScopeName(Scope scope);
absl::string_view OutcomeName(Outcome outcome);
absl::string_view ReasonName(Reason reason);
// nullopt for a name that is not a scope.
std::optional<Scope> ParseScope(absl::string_view name);

struct ModelFingerprint {
  std::string architecture;
  int64_t num_layers = 0;
  int64_t num_qo_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  std::string rope_json;  // JSON object, empty when not stated
  std::string revision;
};

struct Budget {
  enum class Kind { kTableDefault, kTokens, kKeptFraction, kBytes };
  Kind kind = Kind::kTableDefault;
  int64_t tokens = 0;  // positions per layer
  double kept_fraction = 0.0;
  int64_t bytes = 0;  // per layer over all KV heads
};

struct ProtectedSpan {
  std::string name;
  int64_t begin = 0;
  int64_t end = 0;  // exclusive
};

// Picks a table: every field that is set must match. A name alone is the line's active version, or
// its canary.
struct TablePin {
  std::string name;
  std::string version;
  std::string digest;  // "sha256:<hex>"
  std::string alias;   // "stable", "canary" or the operator's own
};

// How layers attend, by their index in the decoder. Groups of another kind than kFull are left out,
// or the operation is refused.
struct LayerGroup {
  enum class Attention { kFull = 1, kSlidingWindow = 2, kMla = 3, kLinear = 4 };
  std::vector<int64_t> layers;
  Attention attention = Attention::kFull;
  int64_t window = 0;  // positions that a row sees, kSlidingWindow only
  bool left_out = false;
};

struct OperationSpec {
  std::string request_id;
  uint64_t request_generation = 0;
  ModelFingerprint model;
  int64_t seq_len = 0;
  int64_t num_rows = 0;                // observed rows W
  std::vector<int64_t> row_positions;  // [W] ascending; empty: the last W positions
  float softmax_scale = 0.0f;
  DType kv_dtype = DType::kF32;
  int64_t value_head_dim = 0;        // 0: head_dim
  std::vector<int32_t> block_table;  // of every paged K and V that brings none

  std::string policy;
  std::map<std::string, std::string> parameters;
  Budget budget;
  Scope scope = Scope::kNative;
  int64_t protect_sink = 0;
  int64_t protect_window = 0;
  std::vector<ProtectedSpan> protect_spans;
  std::optional<double> ppl;
  std::vector<float> window_logprobs;  // natural log
  TablePin table;
  // A second table that is asked from the same observations and never applied; the reply says how
  // far it agrees. Without a name and a digest: of the line that decides.
  std::optional<TablePin> shadow_table;
  Mode mode = Mode::kDecide;
  GatherMode gather = GatherMode::kNone;
  // Soft: past it the outcome is kept_full, reason deadline. 0: none.
  int64_t deadline_ms = 0;
  // First positions whose blocks other sequences use too; kInPlace is refused with any.
  int64_t shared_prefix_tokens = 0;
  // Empty: all layers attend fully. Else every layer of the decoder is in one group, and those not
  // left out are layers 0..num_layers-1 of the operation.
  std::vector<LayerGroup> layer_groups;
};

// [H, W, d] queries, [H, W, T] tile or [H, W] log-sum-exp. Strides in elements, 0 = contiguous.
// data nullptr: absent.
struct RowsTensor {
  const void* data = nullptr;
  int64_t size_bytes = 0;
  DType dtype = DType::kF32;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

// K or V of one layer, logical [num_kv_heads, T, head_dim]; strides as in the wire contract.
struct KvTensor {
  const void* data = nullptr;
  int64_t size_bytes = 0;
  DType dtype = DType::kF32;
  int64_t head_stride = 0;
  int64_t token_stride = 0;
  int64_t block_size = 0;
  int64_t block_stride = 0;
  std::vector<int32_t> block_table;
};

// Where the kept rows of a layer go: tensors in a region registered read-write. Logical shape
// [num_kv_heads, capacity_tokens, head_dim].
struct Destination {
  KvTensor k;
  KvTensor v;
  int64_t capacity_tokens = 0;
};

// What column statistics hold of the attention of the W observed rows.
enum class ColumnReduction {
  kMean,  // sum over the rows divided by W
  kSum,
};

// Of the logarithm in a log-sum-exp: FlashAttention gives base e, FlashInfer base 2.
enum class LseBase { kE, kTwo };

struct LayerInput {
  int64_t layer = 0;
  // Ascending query heads that q_window, window_lse and attn_tile hold, where InputNeeds lists
  // some; empty: all.
  std::vector<int64_t> qo_heads;
  RowsTensor q_window;
  RowsTensor window_lse;
  LseBase lse_base = LseBase::kE;
  RowsTensor attn_tile;  // wins over q_window
  // [H, T], row_stride unused: instead of q_window and attn_tile, where InputNeeds says so.
  RowsTensor column_stats;
  ColumnReduction column_reduction = ColumnReduction::kMean;
  KvTensor k;
  KvTensor v;
  std::optional<Destination> destination;
};

struct KeepSet {
  std::vector<int32_t> keep_indices;  // ascending
  int64_t candidates = 0;
  int64_t filled = 0;
};

// The kept rows of one KV head: row i of K is at k + i * k_row_bytes. Views into the destination
// region, or into bytes the result owns.
struct GatheredHead {
  const std::byte* k = nullptr;
  const std::byte* v = nullptr;
  int64_t k_row_bytes = 0;
  int64_t v_row_bytes = 0;
  int64_t num_tokens = 0;
};

struct LayerResult {
  int64_t layer = 0;
  std::vector<KeepSet> sets;  // one, or one per KV head in scope kv_head
  std::optional<double> tau;
  std::optional<double> entropy;
  std::optional<int64_t> entropy_bin;
  // [num_kv_heads] when rows were gathered into contiguous storage. Empty otherwise: nothing was
  // asked for, nothing was moved since everything is kept, or the destination is paged and the
  // caller has its block table.
  std::vector<GatheredHead> gathered;
  std::shared_ptr<const std::string> owned_k;
  std::shared_ptr<const std::string> owned_v;
};

struct TableIdentity {
  std::string name;
  std::string version;
  std::string digest;
  std::string source;
};

// What OperationSpec::shadow_table would have kept.
struct ShadowResult {
  TableIdentity table;
  // Share of the positions kept here that the shadow table keeps too, mean over layers.
  double kept_overlap = 0.0;
  int64_t would_be_bytes = 0;  // bytes_after by the shadow table
  std::string error;           // why there is none; the fields above are then not set
};

struct StageSeconds {
  double queue = 0.0;
  double lease = 0.0;
  double score = 0.0;
  double select = 0.0;
  double gather = 0.0;
};

struct OperationResult {
  Outcome outcome = Outcome::kCompressed;
  Reason reason = Reason::kNone;
  std::string policy;
  Scope scope = Scope::kNative;
  int64_t seq_len = 0;
  int64_t budget_tokens = 0;
  std::optional<TableIdentity> table;
  std::optional<double> entropy;
  std::optional<double> ppl;
  std::optional<int64_t> entropy_bin;
  std::optional<int64_t> ppl_bin;
  // Share of the score outside the cut, and the miss rate the table's calibration predicts for it.
  std::optional<double> outside_mass;
  std::optional<double> predicted_miss_rate;
  bool has_candidates = false;
  std::vector<LayerResult> layers;  // [num_layers]
  std::vector<std::string> defaulted_inputs;
  std::vector<std::string> relaxed;
  std::string backend;
  std::string transport;  // where the server read K and V
  int64_t bytes_before = 0;
  int64_t bytes_after = 0;
  StageSeconds stages;
  std::optional<ShadowResult> shadow;    // when the request named a shadow_table
  std::vector<int64_t> layers_left_out;  // of OperationSpec::layer_groups, ascending
};

// What a worker has to send for an operation.
struct InputNeeds {
  struct Layer {
    int64_t layer = 0;
    bool queries = false;  // q_window (or attn_tile)
    bool keys = false;
    bool values = false;
    bool columns = false;  // column_stats serve instead of queries and keys
    // Heads that are read; empty: all.
    std::vector<int64_t> qo_heads;
    std::vector<int64_t> kv_heads;
  };
  std::vector<Layer> layers;  // ascending; others may be left out, unless K and V are gathered
  // The last of the observed rows that are read, and the most that column_stats may stand for; 0:
  // all.
  int64_t max_rows = 0;
  bool ppl = false;
  bool last_row = false;       // the last row of the prompt observes
  bool observed_rows = false;  // rows that the request chooses observe
  bool probe_rows = false;     // rows of the probe observe
  std::string probe_name;
  std::string probe_text;
  std::optional<TableIdentity> table;
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_OPERATION_H_
