// What the tests of policy observation_heads share: a prompt, a table, and the definitions of
// docs/observation-heads.md in plain fp64 loops.
#ifndef KEEPSET_TESTS_ENGINE_OBSERVATION_HEADS_TEST_SUPPORT_H_
#define KEEPSET_TESTS_ENGINE_OBSERVATION_HEADS_TEST_SUPPORT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gtest/gtest.h"
#include "tables/observation_heads_table.h"
#include "tests/engine/run_operation.h"

namespace keepset::engine::testing {

inline constexpr int64_t kBudget = 20;

// 3 layers, 4 query heads, 2 KV heads, 96 positions, 8 observed rows.
class ObservationHeadsTest : public ::testing::Test {
 protected:
  OperationSpec Spec() const;

  // Layer by layer, those of `left_out` not at all.
  absl::StatusOr<OperationResult> Run(const OperationSpec& spec,
                                      const std::vector<int64_t>& left_out = {});

  void ExpectRefused(const OperationSpec& spec, absl::StatusCode code, const std::string& message);

  fakes::SyntheticPrompt prompt_{fakes::PromptShape{}};
  std::vector<tables::HeadObservation> observations_ = {
      {2, 0, tables::ObservedRows::kMaxRows, 1.0f},
      {0, 3, tables::ObservedRows::kLastRow, 0.5f},
      {0, 2, tables::ObservedRows::kMeanRows, 0.75f},
      {0, 1, tables::ObservedRows::kKeyNovelty, 0.1f}};
  tables::ObservationSettings settings_;
  Bench bench_;
};

using Scores = std::vector<double>;

struct Asked {
  int64_t pool = 1;
  std::string merge = "sum";
  std::string normalization = "max";
  int64_t sink = 2;       // excluded from normalisation
  int64_t first_row = 0;  // observing rows, of those that are given
  int64_t end_row = 8;
  int64_t prompt_rows = 8;  // rows from here on are the probe's
  std::vector<int64_t> row_positions;
};

// [T]: undilated scores of `observations`.
Scores ObservationScores(const fakes::SyntheticPrompt& prompt,
                         const std::vector<tables::HeadObservation>& observations,
                         const Asked& asked);

// Whether the protected sinks and then the best of `scores` were kept in every layer.
void ExpectKept(const OperationResult& result, Scores scores);

}  // namespace keepset::engine::testing

#endif  // KEEPSET_TESTS_ENGINE_OBSERVATION_HEADS_TEST_SUPPORT_H_
