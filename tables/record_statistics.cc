#include "tables/record_statistics.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "tables/decision_table.h"

namespace keepset::tables {
namespace {

// Rewards of at most kMaxAbsReward = 2^20 in units of 2^-40 fit 61 bits, their squares in units of
// 2^-60 fit 101 bits: 2^27 records cannot overflow 128.
constexpr int kRewardUnit = -40;
constexpr int kSquareUnit = -60;
constexpr std::size_t kMaxListedRejections = 20;

constexpr int kCellBits = 21;
constexpr int kLayerBits = 12;

uint64_t PackedKey(const StateKey& key) {
  return static_cast<uint64_t>(key.budget) << (kCellBits + kLayerBits) |
         static_cast<uint64_t>(key.layer) << kCellBits | static_cast<uint64_t>(key.cell);
}

double ToDouble(absl::int128 value, int unit) {
  return std::ldexp(static_cast<double>(value), unit);
}

std::string BudgetList(const std::map<int64_t, int64_t>& budgets) {
  if (budgets.empty()) return "none";
  return absl::StrJoin(budgets, ", ", [](std::string* out, const auto& entry) {
    absl::StrAppend(out, entry.first);
  });
}

// As numpy's linear method: both ends of the interval are hit exactly.
double Quantile(absl::Span<const double> sorted, double fraction) {
  const double position = fraction * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(position);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  const double weight = position - static_cast<double>(below);
  const double gap = sorted[above] - sorted[below];
  return weight < 0.5 ? sorted[below] + gap * weight : sorted[above] - gap * (1 - weight);
}

}  // namespace

absl::StatusOr<int64_t> StateStatistics::Add(const StateKey& key, int action, double reward) {
  const auto [entry, inserted] = index_.try_emplace(PackedKey(key), num_states());
  if (inserted) {
    if (num_states() >= max_states_) {
      return absl::ResourceExhaustedError(
          absl::StrCat("more than ", max_states_, " states, want fewer budgets or bins"));
    }
    keys_.push_back(key);
    counts_.resize(counts_.size() + num_actions_);
    sums_.resize(sums_.size() + num_actions_);
    squares_.emplace_back(0);
  }
  const int64_t state = entry->second;
  const int64_t cell = state * num_actions_ + action;
  ++counts_[cell];
  sums_[cell] += static_cast<int64_t>(std::llrint(std::ldexp(reward, -kRewardUnit)));
  squares_[state] += absl::int128(std::ldexp(reward * reward, -kSquareUnit));
  return state;
}

std::optional<int64_t> StateStatistics::Find(const StateKey& key) const {
  const auto found = index_.find(PackedKey(key));
  if (found == index_.end()) return std::nullopt;
  return found->second;
}

int64_t StateStatistics::total(int64_t state) const {
  int64_t total = 0;
  for (const int64_t count : counts(state)) total += count;
  return total;
}

std::vector<double> StateStatistics::MeanRewards(int64_t state) const {
  std::vector<double> means(num_actions_);
  for (int action = 0; action < num_actions_; ++action) {
    const int64_t cell = state * num_actions_ + action;
    if (counts_[cell] > 0) means[action] = ToDouble(sums_[cell], kRewardUnit) / counts_[cell];
  }
  return means;
}

double StateStatistics::RewardVariance(int64_t state) const {
  const std::vector<double> means = MeanRewards(state);
  double explained = 0;
  for (int action = 0; action < num_actions_; ++action) {
    explained += means[action] * means[action] * counts(state)[action];
  }
  const double total_squares = ToDouble(squares_[state], kSquareUnit);
  return std::max(0.0, (total_squares - explained) / static_cast<double>(total(state)));
}

std::vector<float> QuantileEdges(std::vector<double>& values, int64_t num_bins) {
  std::sort(values.begin(), values.end());
  std::vector<float> edges;
  for (int64_t i = 1; i < num_bins; ++i) {
    const double fraction = static_cast<double>(i) / static_cast<double>(num_bins);
    edges.push_back(static_cast<float>(Quantile(values, fraction)));
  }
  return edges;
}

absl::Status RecordStatistics::Reject(const RecordChunk& chunk, int64_t line,
                                      absl::string_view message) {
  std::string text = absl::StrCat(chunk.file, ": line ", chunk.lines_before + line, ": ", message);
  ++num_rejected_;
  if (num_rejected_ > limits_.max_rejected) {
    if (limits_.max_rejected > 0) {
      absl::StrAppend(&text, " (more than ", limits_.max_rejected, " records rejected)");
    }
    return absl::InvalidArgumentError(text);
  }
  if (first_rejections_.size() < kMaxListedRejections) {
    first_rejections_.push_back(std::move(text));
  }
  return absl::OkStatus();
}

absl::Status RecordStatistics::AddRow(const RecordChunk& chunk, const RecordRow& row) {
  if (row.kind == RecordKind::kHead && head_unit_.value_or(row.head_unit) != row.head_unit) {
    return Reject(chunk, row.line,
                  "head and kv_head are mixed, want one of them in all head records");
  }
  if (!seen_.insert(row.identity).second) {
    ++num_duplicates_;
    return Reject(chunk, row.line,
                  "repeats an earlier record of the same prompt_id, seed, state, action and "
                  "paired_policy, want each once");
  }
  if (num_head_records_ + num_gate_records_ >= limits_.max_records) {
    return absl::ResourceExhaustedError(
        absl::StrCat("more than ", limits_.max_records, " records, want fewer in one compilation"));
  }
  const std::string& policy = chunk.policies[row.policy];
  if (policy.empty()) {
    ++num_unpaired_records_;
  } else {
    ++policies_[policy];
    if (static_cast<int64_t>(policies_.size()) > limits_.max_policies) {
      return absl::ResourceExhaustedError(
          absl::StrCat(chunk.file, ": line ", chunk.lines_before + row.line, ": more than ",
                       limits_.max_policies, " different values of paired_policy"));
    }
  }
  if (row.kind == RecordKind::kHead) {
    head_unit_ = row.head_unit;
    ++num_head_records_;
    ++head_budgets_[row.budget];
    KEEPSET_ASSIGN_OR_RETURN(const int64_t state,
                             heads_.Add({row.budget, row.layer, row.head}, row.action, row.reward));
    if (keeping_ == RowKeeping::kKeep) {
      head_rows_.push_back({row.reward, static_cast<uint32_t>(state), row.action});
    }
    return absl::OkStatus();
  }
  if (num_gate_records_ >= limits_.max_gate_records) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "more than ", limits_.max_gate_records, " gate records, want fewer in one compilation"));
  }
  ++num_gate_records_;
  ++gate_budgets_[row.budget];
  gate_rows_.back().push_back(
      {row.entropy, row.ppl, row.reward, row.budget, row.layer, row.action});
  return absl::OkStatus();
}

absl::Status RecordStatistics::Add(const RecordChunk& chunk) {
  const auto gate_rows =
      std::count_if(chunk.rows.begin(), chunk.rows.end(),
                    [](const RecordRow& row) { return row.kind == RecordKind::kGate; });
  gate_rows_.emplace_back().reserve(gate_rows);
  // Bad lines and rows in the order of the file, so that the first of them is the one reported.
  auto bad = chunk.bad_lines.begin();
  const auto reject_before = [&](int64_t line) {
    for (; bad != chunk.bad_lines.end() && bad->line < line; ++bad) {
      KEEPSET_RETURN_IF_ERROR(Reject(chunk, bad->line, bad->message));
    }
    return absl::OkStatus();
  };
  for (const RecordRow& row : chunk.rows) {
    KEEPSET_RETURN_IF_ERROR(reject_before(row.line));
    KEEPSET_RETURN_IF_ERROR(AddRow(chunk, row));
  }
  return reject_before(INT64_MAX);
}

absl::Status RecordStatistics::CheckCoverage() const {
  const auto same_budget = [](const auto& a, const auto& b) { return a.first == b.first; };
  if (num_head_records_ == 0 || num_gate_records_ == 0 ||
      !std::equal(head_budgets_.begin(), head_budgets_.end(), gate_budgets_.begin(),
                  gate_budgets_.end(), same_budget)) {
    return absl::InvalidArgumentError(
        absl::StrCat("records: budget: head records cover ", BudgetList(head_budgets_),
                     ", gate records ", BudgetList(gate_budgets_), ", want the same budgets"));
  }
  return absl::OkStatus();
}

absl::StatusOr<GateStatistics> RecordStatistics::BinGates(int64_t num_entropy_bins,
                                                          int64_t num_ppl_bins,
                                                          RowKeeping keeping) const {
  if (num_gate_records_ == 0) {
    return absl::InvalidArgumentError("records: no gate record, want some to place the bins");
  }
  const auto edges_of = [this](double GateRow::*column, int64_t num_bins) {
    std::vector<double> values;
    if (num_bins > 1) {
      values.reserve(num_gate_records_);
      for (const std::vector<GateRow>& block : gate_rows_) {
        for (const GateRow& row : block) values.push_back(row.*column);
      }
    }
    return QuantileEdges(values, num_bins);
  };
  GateStatistics gates{edges_of(&GateRow::entropy, num_entropy_bins),
                       edges_of(&GateRow::ppl, num_ppl_bins),
                       StateStatistics(num_gate_actions_, limits_.max_states),
                       {}};
  if (keeping == RowKeeping::kKeep) gates.rows.reserve(num_gate_records_);
  for (const std::vector<GateRow>& block : gate_rows_) {
    for (const GateRow& row : block) {
      const int64_t cell =
          BinOf(gates.entropy_edges, row.entropy) * num_ppl_bins + BinOf(gates.ppl_edges, row.ppl);
      KEEPSET_ASSIGN_OR_RETURN(const int64_t state, gates.states.Add({row.budget, row.layer, cell},
                                                                     row.action, row.reward));
      if (keeping == RowKeeping::kKeep) {
        gates.rows.push_back({row.reward, static_cast<uint32_t>(state), row.action});
      }
    }
  }
  return gates;
}

}  // namespace keepset::tables
