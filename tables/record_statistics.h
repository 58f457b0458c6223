// Sufficient statistics of calibration records: per state and action the number of records and the
// sum of their rewards.
//
// Rewards are summed as integers, so that neither the order of the records nor the number of
// threads changes a bit of the result. Gate states need the bin edges first, which are quantiles of
// all gate records: those rows are kept, 32 bytes each, up to a stated number.
#ifndef KEEPSET_TABLES_RECORD_STATISTICS_H_
#define KEEPSET_TABLES_RECORD_STATISTICS_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/numeric/int128.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "tables/calibration_records.h"

namespace keepset::tables {

// One state: a head unit or a risk cell of one layer under one budget.
struct StateKey {
  int64_t budget = 0;
  int64_t layer = 0;
  int64_t cell = 0;  // head: index of the unit; gate: entropy_bin * num_ppl_bins + ppl_bin

  auto operator<=>(const StateKey&) const = default;
};

class StateStatistics {
 public:
  StateStatistics(int num_actions, int64_t max_states)
      : num_actions_(num_actions), max_states_(max_states) {}

  // The state's index; ResourceExhausted when there are too many.
  absl::StatusOr<int64_t> Add(const StateKey& key, int action, double reward);

  int num_actions() const { return num_actions_; }
  int64_t num_states() const { return static_cast<int64_t>(keys_.size()); }
  std::optional<int64_t> Find(const StateKey& key) const;
  const StateKey& key(int64_t state) const { return keys_[state]; }
  // [num_actions]
  absl::Span<const int64_t> counts(int64_t state) const {
    return absl::MakeConstSpan(counts_).subspan(state * num_actions_, num_actions_);
  }
  int64_t total(int64_t state) const;
  // [num_actions]; 0 where nothing was logged.
  std::vector<double> MeanRewards(int64_t state) const;
  // Mean squared deviation of the rewards from the mean of their action.
  double RewardVariance(int64_t state) const;

 private:
  const int num_actions_;
  const int64_t max_states_;
  absl::flat_hash_map<uint64_t, int64_t> index_;
  std::vector<StateKey> keys_;
  std::vector<int64_t> counts_;        // [num_states, num_actions]
  std::vector<absl::int128> sums_;     // [num_states, num_actions], in kRewardUnit
  std::vector<absl::int128> squares_;  // [num_states], in kSquareUnit
};

struct RecordLimits {
  int64_t max_rejected = 0;  // bad lines that are counted instead of ending the run
  int64_t max_records = int64_t{1} << 27;
  int64_t max_gate_records = int64_t{1} << 25;
  int64_t max_states = int64_t{1} << 18;
  int64_t max_policies = 4096;
};

struct GateRow {
  double entropy = 0;
  double ppl = 0;
  double reward = 0;
  uint32_t budget = 0;
  uint16_t layer = 0;
  uint8_t action = 0;
};

// One logged action of a known state, for solvers that walk over single records.
struct StateRow {
  double reward = 0;
  uint32_t state = 0;
  uint8_t action = 0;
};

enum class RowKeeping { kNone, kKeep };

// Linear-interpolated quantiles i / num_bins, i = 1..num_bins - 1, computed in double and stored as
// F32. Empty for one bin; `values` is sorted in place and must not be empty.
std::vector<float> QuantileEdges(std::vector<double>& values, int64_t num_bins);

struct GateStatistics {
  std::vector<float> entropy_edges;  // [E - 1]
  std::vector<float> ppl_edges;      // [P - 1]
  StateStatistics states;
  std::vector<StateRow> rows;  // only when asked for
};

// Collects committed chunks. Not thread-safe.
class RecordStatistics {
 public:
  RecordStatistics(const RecordLimits& limits, RowKeeping keeping, const ActionGrids& actions = {})
      : limits_(limits),
        keeping_(keeping),
        num_gate_actions_(actions.gate.size),
        heads_(actions.head.size, limits.max_states) {}

  // InvalidArgument "<file>: line N: ..." for a bad or duplicate record beyond max_rejected;
  // ResourceExhausted beyond the limits.
  absl::Status Add(const RecordChunk& chunk);

  // InvalidArgument when there are no records, or when head and gate records differ in budgets.
  absl::Status CheckCoverage() const;
  // InvalidArgument without gate records.
  absl::StatusOr<GateStatistics> BinGates(int64_t num_entropy_bins, int64_t num_ppl_bins,
                                          RowKeeping keeping) const;

  const StateStatistics& heads() const { return heads_; }
  std::optional<HeadUnit> head_unit() const { return head_unit_; }
  const std::vector<StateRow>& head_rows() const { return head_rows_; }
  int64_t num_head_records() const { return num_head_records_; }
  int64_t num_gate_records() const { return num_gate_records_; }
  int64_t num_unpaired_records() const { return num_unpaired_records_; }
  int64_t num_rejected() const { return num_rejected_; }
  int64_t num_duplicates() const { return num_duplicates_; }  // among the rejected
  const std::vector<std::string>& first_rejections() const { return first_rejections_; }
  // Records per paired_policy.
  const std::map<std::string, int64_t>& policies() const { return policies_; }
  // Records per budget.
  const std::map<int64_t, int64_t>& head_budgets() const { return head_budgets_; }
  const std::map<int64_t, int64_t>& gate_budgets() const { return gate_budgets_; }

 private:
  absl::Status Reject(const RecordChunk& chunk, int64_t line, absl::string_view message);
  absl::Status AddRow(const RecordChunk& chunk, const RecordRow& row);

  const RecordLimits limits_;
  const RowKeeping keeping_;
  const int num_gate_actions_;
  absl::flat_hash_set<uint64_t> seen_;
  StateStatistics heads_;
  std::optional<HeadUnit> head_unit_;
  std::vector<StateRow> head_rows_;
  std::vector<std::vector<GateRow>> gate_rows_;  // one block per chunk
  std::map<std::string, int64_t> policies_;
  std::map<int64_t, int64_t> head_budgets_;
  std::map<int64_t, int64_t> gate_budgets_;
  int64_t num_head_records_ = 0;
  int64_t num_gate_records_ = 0;
  int64_t num_unpaired_records_ = 0;
  int64_t num_rejected_ = 0;
  int64_t num_duplicates_ = 0;
  std::vector<std::string> first_rejections_;
};

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_RECORD_STATISTICS_H_
