// Calibration records for tests, as lines of JSON.
#ifndef KEEPSET_TESTS_TABLES_RECORD_SAMPLES_H_
#define KEEPSET_TESTS_TABLES_RECORD_SAMPLES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"

namespace keepset::tables {

// Whole records; a test changes the field it is about.
nlohmann::json HeadRecord();
nlohmann::json GateRecord();

// A log for SmallModel() (2 layers, 4 query heads): budgets 64 and 128, two entropy and two
// perplexity levels, every other record a gate's. States and actions come in turn, so that each is
// logged equally often in whole rounds of 16 states. A head record's loss grows with the distance
// of its action from PreferredHeadAction, a gate record's with that from kPreferredGateAction, by
// 0.1 a step, plus noise in +-0.02.
inline constexpr int64_t kRecordsPerRound = 2 * 16 * 29 * 21;
std::vector<std::string> RandomRecords(int64_t count, uint64_t seed);
int PreferredHeadAction(int64_t budget, int64_t layer, int64_t head);
inline constexpr int kPreferredGateAction = 7;

std::string JoinLines(const std::vector<std::string>& lines);

}  // namespace keepset::tables

#endif  // KEEPSET_TESTS_TABLES_RECORD_SAMPLES_H_
