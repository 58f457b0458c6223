// A decision table: the immutable content of one table file (formats.md "Table").
//
// DecisionTable is the part every kind has: identity, fingerprint, provenance. CompilerKvTable adds
// the head weights and gate thresholds of CompilerKV (methods.md 1.2), ObservationHeadsTable
// (observation_heads_table.h) a list of observing heads. A table is validated completely when it is
// made and never changes; published tables are shared by shared_ptr<const DecisionTable>.
#ifndef KEEPSET_TABLES_DECISION_TABLE_H_
#define KEEPSET_TABLES_DECISION_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "tables/model_fingerprint.h"

namespace keepset::tables {

class CompilerKvTable;
class ObservationHeadsTable;

// What every reply says about the table it used.
struct TableIdentity {
  std::string name;
  std::string version;
  std::string digest;  // "sha256:<hex>" of the file

  bool operator==(const TableIdentity&) const = default;
};

class DecisionTable {
 public:
  virtual ~DecisionTable() = default;

  virtual absl::string_view kind() const = 0;  // "compilerkv", "observation_heads"
  virtual const TableIdentity& identity() const = 0;
  virtual const ModelFingerprint& model() const = 0;
  // "offline-calibration", "offline-independent-ablation", "uniform" or "hand-written".
  virtual absl::string_view provenance_source() const = 0;
  // provenance.created; InfinitePast where it is not stated as an RFC 3339 time.
  virtual absl::Time created() const = 0;
  // The file's whole JSON document, for inspect.
  virtual const std::string& metadata_json() const = 0;
  // Tensors and JSON keys of the file that this version does not know and ignored.
  virtual const std::vector<std::string>& ignored() const = 0;
  // The whole file, as digested.
  virtual absl::Span<const std::byte> file_bytes() const = 0;

  // Budget used when a request names none: default_budget, else the only budget, else
  // InvalidArgument.
  virtual absl::StatusOr<int64_t> DefaultBudget() const = 0;

  // This table as one of a kind, or nullptr when it is of another.
  virtual const CompilerKvTable* AsCompilerKv() const { return nullptr; }
  virtual const ObservationHeadsTable* AsObservationHeads() const { return nullptr; }
};

enum class TableBudgetMatch { kExact, kNearest };

// The slice of a CompilerKvTable that serves one operation: one budget, all layers, after the
// relaxations the request asked for.
struct CompilerKvSlice {
  int64_t num_layers = 0;
  int64_t num_qo_heads = 0;
  int64_t num_entropy_bins = 0;
  int64_t num_ppl_bins = 0;
  std::vector<float> head_weights;     // [L, H]
  std::vector<float> gate_thresholds;  // [L, E, P]
  std::vector<std::string>
      relaxed;  // "table_budget: 512 served by 256", "layer_match: 24 layers from 32"

  float head_weight(int64_t layer, int64_t head) const {
    return head_weights[layer * num_qo_heads + head];
  }
  float gate(int64_t layer, int64_t entropy_bin, int64_t ppl_bin) const {
    return gate_thresholds[(layer * num_entropy_bins + entropy_bin) * num_ppl_bins + ppl_bin];
  }
};

class CompilerKvTable : public DecisionTable {
 public:
  virtual absl::Span<const int64_t> budgets() const = 0;  // empty: serves any budget
  virtual std::optional<int64_t> default_budget() const = 0;
  virtual absl::Span<const float> entropy_edges() const = 0;    // [E - 1]
  virtual absl::Span<const float> ppl_edges() const = 0;        // [P - 1]
  virtual absl::Span<const float> head_weights() const = 0;     // [N_B or 1, L, H]
  virtual absl::Span<const float> gate_thresholds() const = 0;  // [N_B or 1, L, E, P]

  // `budget_tokens` is the budget as requested, before any clamp to the prompt length.
  // FailedPrecondition lists the compiled budgets when the budget does not match.
  // kNearest: smallest absolute difference, the lower budget on ties. `num_layers` other than the
  // table's needs kInterpolateDepth (piecewise linear over relative depth, methods.md 1.2).
  virtual absl::StatusOr<CompilerKvSlice> Slice(int64_t budget_tokens,
                                                TableBudgetMatch budget_match, int64_t num_layers,
                                                LayerMatch layer_match) const = 0;
};

// Number of edges <= x, with x rounded to F32 first (formats.md: one rule for bins).
int64_t BinOf(absl::Span<const float> edges, double x);

// [rows_in, row_size] resampled to [rows_out, row_size], piecewise linear with both grids
// linspace(0, 1); one row is repeated. Golden: [0.8, 1.5] to 3 rows = [0.8, 1.15, 1.5].
std::vector<float> InterpolateDepth(absl::Span<const float> values, int64_t rows_in,
                                    int64_t row_size, int64_t rows_out);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_DECISION_TABLE_H_
