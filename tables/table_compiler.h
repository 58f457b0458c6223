// From calibration records to a table: reads, bins, fits every state, fills the arrays and says in
// a report what the records supported.
#ifndef KEEPSET_TABLES_TABLE_COMPILER_H_
#define KEEPSET_TABLES_TABLE_COMPILER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "tables/adam_solver.h"
#include "tables/calibration_records.h"
#include "tables/model_fingerprint.h"
#include "tables/record_statistics.h"
#include "tables/table_file.h"

namespace keepset::tables {

enum class TableSolver { kExact, kAdam };
enum class SolverComparison { kNone, kCompare };

struct BinCounts {
  int64_t entropy = 20;
  int64_t ppl = 4;
};

struct CompileOptions {
  std::string name;
  std::string version;
  ModelFingerprint model;
  TableSolver solver = TableSolver::kExact;
  SolverComparison comparison = SolverComparison::kNone;
  double conservative_weight = 0.75;
  AdamOptions adam;
  BinCounts bins;
  ActionGrids actions;
  PairedPolicyRule paired_policy = PairedPolicyRule::kRequired;
  std::optional<int64_t> default_budget;
  RecordLimits limits;
  int num_threads = 0;  // 0: all cores this process may use
  absl::Time created;
  std::string tool_version;
};

struct CompiledTable {
  CompilerKvTableContent content;
  std::string report_json;  // docs/table-compiler.md names its fields
};

// The content depends on the records as a multiset only: neither their order nor the number of
// threads changes a bit of it, apart from calibration_digest. (The adam solver draws rows by
// number, so there the order matters.)
absl::StatusOr<CompiledTable> CompileTable(const std::vector<std::string>& record_paths,
                                           const CompileOptions& options,
                                           const RecordProgress& progress);

// What record files hold, for people and tools, as JSON. Bad and duplicate records are counted,
// never an error.
absl::StatusOr<std::string> SummarizeRecords(const std::vector<std::string>& record_paths,
                                             const BinCounts& bins, const ActionGrids& actions,
                                             int num_threads, const RecordProgress& progress);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_TABLE_COMPILER_H_
