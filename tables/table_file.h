// Reading, validating and writing table files, and importing a CompilerKV reference directory.
#ifndef KEEPSET_TABLES_TABLE_FILE_H_
#define KEEPSET_TABLES_TABLE_FILE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "tables/decision_table.h"

namespace keepset::tables {

// Reads and validates completely: schema, shapes, ranges, finiteness, edges, provenance. The bytes
// are copied before they are checked, so a later write to the file cannot change the table.
// NotFound: no such file. InvalidArgument: damaged or out of range, naming file, field, value and
// what would be right. FailedPrecondition: simulated or synthetic provenance, unknown kind or newer
// version. Aborted: the file changed while it was read.
absl::StatusOr<std::shared_ptr<const DecisionTable>> ReadTable(const std::string& path);
absl::StatusOr<std::shared_ptr<const DecisionTable>> ParseTable(absl::Span<const std::byte> bytes,
                                                                absl::string_view label);
// The same of bytes that are handed over: held once, not copied.
absl::StatusOr<std::shared_ptr<const DecisionTable>> ParseOwnedTable(std::string bytes,
                                                                     absl::string_view label);
// A table whose tensors stay in a private mapping of `path`, so that they cost page cache and no
// memory of this process until they are read. Only for files that nobody ever changes in place:
// a mapping of one that shrinks faults. DataLoss: the file has another digest.
absl::StatusOr<std::shared_ptr<const DecisionTable>> MapTable(const std::string& path,
                                                              absl::string_view digest);

// "sha256:<hex>" of a file's bytes: its TableIdentity::digest.
std::string FileDigest(absl::Span<const std::byte> bytes);

// Everything a compilerkv table file states; what Write and the compiler fill in.
struct CompilerKvTableContent {
  std::string name;
  std::string version;
  ModelFingerprint model;
  std::vector<int64_t> budgets;  // empty: any budget, tensors without the N_B axis
  std::optional<int64_t> default_budget;
  std::vector<float> entropy_edges;    // [E - 1]
  std::vector<float> ppl_edges;        // [P - 1]
  std::vector<float> head_weights;     // [N_B, L, H]
  std::vector<float> gate_thresholds;  // [N_B, L, E, P]
  std::string algorithm_json = "{}";
  std::string provenance_json = "{}";  // must hold "source"
  std::string evaluation_json = "{}";
  std::optional<std::pair<float, float>> head_grid;  // default 0.8..1.5
  std::optional<std::pair<float, float>> gate_grid;  // default 0.8..1.0
};

// The file's bytes; validated by parsing them back.
absl::StatusOr<std::string> SerializeTable(const CompilerKvTableContent& content);

// Values of states without records, in a compiled table and in one made elsewhere.
inline constexpr float kUnsupportedHeadWeight = 1.0f;
inline constexpr float kUnsupportedGate = 0.8f;

// Neutral table for `model`: every head weight and every gate the same; provenance source
// "uniform".
CompilerKvTableContent UniformTable(const ModelFingerprint& model, float head_weight, float gate);

struct ImportOptions {
  std::string name;
  std::string version;
  // The reference manifest names no architecture, KV heads or head_dim; the caller states them.
  ModelFingerprint model;
  // Needed when the reference arrays have no budget axis and the manifest no budget_values.
  std::optional<int64_t> budget;
};

// Reads manifest.json + W_head.npy + T_gate.npy (methods.md 1.2). NPY v1/v2/v3, little-endian f4 or
// f8, C or Fortran order; object arrays are refused. Simulated or synthetic sources are refused.
absl::StatusOr<CompilerKvTableContent> ImportReferenceDirectory(const std::string& directory,
                                                                const ImportOptions& options);

// One JSON document for people and tools: kind, identity, fingerprint, algorithm, provenance,
// evaluation, ignored, and what the kind holds (compilerkv: tensors with shape and range, budgets,
// bins, edges).
std::string InspectTable(const DecisionTable& table);

// How two tables decide differently, one JSON document; keys without meaning for the pair are null:
// shared_budgets; head_rankings {mean_spearman, mean_kendall, by_layer [{budget, layer, spearman,
// kendall}]}; head_weights and gate_thresholds {compared, changed, largest, mean, cells [{budget,
// layer, head | entropy_bin, ppl_bin, a, b}]}, the 50 largest changes first. Needs equal layer and
// head counts and a shared budget, gates equal bin edges too.
std::string CompareTables(const DecisionTable& a, const DecisionTable& b);

// What differs between two tables, a line each; empty when the content is the same.
std::vector<std::string> DiffTables(const DecisionTable& a, const DecisionTable& b);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_TABLE_FILE_H_
