#include "tests/tables/record_samples.h"

#include <cmath>
#include <random>

#include "absl/strings/str_cat.h"
#include "tables/calibration_record.h"

namespace keepset::tables {

nlohmann::json HeadRecord() {
  return {{"kind", "head"},
          {"prompt_id", "p1"},
          {"seed", 0},
          {"layer", 1},
          {"head", 2},
          {"budget", 64},
          {"action", 1.125},
          {"full_loss", 2.0},
          {"compressed_loss", 2.5},
          {"sequence_length", 2048},
          {"paired_policy", "g-1"}};
}

nlohmann::json GateRecord() {
  return {{"kind", "gate"},
          {"prompt_id", "p1"},
          {"seed", 0},
          {"layer", 1},
          {"budget", 64},
          {"action", 0.9},
          {"full_loss", 2.0},
          {"compressed_loss", 2.5},
          {"entropy", 8.42},
          {"ppl", 12.7},
          {"candidate_count", 576},
          {"sequence_length", 2048},
          {"paired_policy", "h-1"}};
}

int PreferredHeadAction(int64_t budget, int64_t layer, int64_t head) {
  return static_cast<int>((budget / 64 * 11 + layer * 5 + head * 3) % kHeadActions.size);
}

std::vector<std::string> RandomRecords(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto fraction = [&random] { return static_cast<double>(random() >> 11) * 0x1p-53; };
  std::vector<std::string> lines;
  for (int64_t i = 0; i < count; ++i) {
    const bool head = i % 2 == 0;
    nlohmann::json record = head ? HeadRecord() : GateRecord();
    const ActionGrid& grid = head ? kHeadActions : kGateActions;
    const int64_t turn = i / 2;
    const int64_t unit = turn % 4;  // the query head, or the risk cell
    const int64_t layer = turn / 4 % 2;
    const int64_t budget = 64 * (1 + turn / 8 % 2);
    const auto action = static_cast<int>(turn / 16 % grid.size);
    const int best = head ? PreferredHeadAction(budget, layer, unit) : kPreferredGateAction;
    record["seed"] = i;
    record["layer"] = layer;
    record["budget"] = budget;
    record["action"] = grid.first + grid.step * action;
    record["compressed_loss"] = 2 + 0.1 * std::abs(action - best) + 0.04 * (fraction() - 0.5);
    if (head) {
      record["head"] = unit;
    } else {
      record["entropy"] = 3 + 3 * (unit / 2) + fraction();
      record["ppl"] = 1 + 25 * (unit % 2) + 10 * fraction();
      record["candidate_count"] = 64;
    }
    lines.push_back(record.dump());
  }
  return lines;
}

std::string JoinLines(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) absl::StrAppend(&text, line, "\n");
  return text;
}

}  // namespace keepset::tables
