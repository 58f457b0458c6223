// observation_heads against the definitions of docs/observation-heads.md in plain fp64 loops.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/observation_heads_test_support.h"
#include "tests/engine/oracle.h"

namespace keepset::engine {
namespace {

using tables::HeadObservation;
using tables::ObservedRows;
using testing::Asked;
using ::testing::ElementsAre;
using testing::ExpectKept;
using testing::ObservationHeadsTest;
using testing::ObservationScores;
using testing::Scores;

Scores Dilated(const Scores& scores, int64_t dilate) {
  Scores result = scores;
  for (size_t t = 0; t < scores.size(); ++t) {
    for (int64_t j = 0; j <= dilate && j <= static_cast<int64_t>(t); ++j) {
      result[t] = std::max(result[t], scores[t - j]);
    }
  }
  return result;
}

TEST_F(ObservationHeadsTest, KeepsWhatTheOracleKeeps) {
  const auto result = Run(Spec());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->scope, Scope::kSequence);
  ExpectKept(*result, ObservationScores(prompt_, observations_, {}));
}

TEST_F(ObservationHeadsTest, PoolsAndDividesBySums) {
  settings_.pool_kernel = 5;
  settings_.normalization = tables::ObservationNormalization::kSum;
  const auto result = Run(Spec());
  ASSERT_TRUE(result.ok()) << result.status();
  Asked asked;
  asked.pool = 5;
  asked.normalization = "sum";
  ExpectKept(*result, ObservationScores(prompt_, observations_, asked));
}

TEST_F(ObservationHeadsTest, MergesByMaximumBelowZeroToo) {
  settings_.merge = tables::ObservationMerge::kMax;
  observations_ = {{1, 0, ObservedRows::kKeyNovelty, 1.0f},
                   {2, 1, ObservedRows::kKeyNovelty, 2.0f}};
  const auto result = Run(Spec());
  ASSERT_TRUE(result.ok()) << result.status();
  Asked asked;
  asked.merge = "max";
  ExpectKept(*result, ObservationScores(prompt_, observations_, asked));
}

TEST_F(ObservationHeadsTest, AHitKeepsThePositionsAfterIt) {
  settings_.dilate = 3;
  observations_ = {{1, 2, ObservedRows::kLastRow, 1.0f}};
  OperationSpec spec = Spec();
  spec.budget.tokens = 6;
  const auto result = Run(spec);
  ASSERT_TRUE(result.ok()) << result.status();
  const Scores scores = ObservationScores(prompt_, observations_, {});
  const int64_t best = std::max_element(scores.begin() + 2, scores.end() - 4) - scores.begin();
  // The best position alone decides what follows it; at the end of the prompt less does.
  if (scores[best] >= *std::max_element(scores.end() - 4, scores.end())) {
    const auto begin = static_cast<int32_t>(best);
    EXPECT_THAT(result->layers[0].keep_indices[0],
                ElementsAre(0, 1, begin, begin + 1, begin + 2, begin + 3));
  }
}

TEST_F(ObservationHeadsTest, DilatesAsTheOracleDoes) {
  settings_.dilate = 2;
  const auto result = Run(Spec());
  ASSERT_TRUE(result.ok()) << result.status();
  // Runs of equal scores straddle the cut: only scores strictly above it must be kept.
  const Scores dilated = Dilated(ObservationScores(prompt_, observations_, {}), 2);
  const std::vector<int32_t>& kept = result->layers[0].keep_indices[0];
  double worst = 1e300;
  for (const int32_t t : kept) worst = t < 2 ? worst : std::min(worst, dilated[t]);
  for (int32_t t = 2; t < 96; ++t) {
    if (dilated[t] > worst + oracle::kTolerance) {
      EXPECT_TRUE(std::binary_search(kept.begin(), kept.end(), t)) << t;
    }
  }
}

TEST_F(ObservationHeadsTest, ObserveChoosesTheRows) {
  OperationSpec spec = Spec();
  spec.parameters["observe"] = "90:93";
  const auto result = Run(spec);
  ASSERT_TRUE(result.ok()) << result.status();
  Asked asked;
  asked.first_row = 2;
  asked.end_row = 5;
  ExpectKept(*result, ObservationScores(prompt_, observations_, asked));
}

TEST_F(ObservationHeadsTest, RowsOfAProbeSeeThePromptAndAreNotKept) {
  settings_.probe = tables::ObservationProbe{"recall", "What was said?"};
  observations_ = {{1, 1, ObservedRows::kProbeMax, 1.0f}, {1, 2, ObservedRows::kProbeMean, 1.0f}};
  OperationSpec spec = Spec();
  spec.parameters["probe"] = "recall";
  spec.row_positions = {90, 91, 92, 93, 96, 97, 98, 99};
  const auto result = Run(spec);
  ASSERT_TRUE(result.ok()) << result.status();
  Asked asked;
  asked.row_positions = spec.row_positions;
  asked.prompt_rows = 4;
  ExpectKept(*result, ObservationScores(prompt_, observations_, asked));
}

TEST_F(ObservationHeadsTest, LayerGroupsHaveSetsOfTheirOwn) {
  settings_.layer_groups = {{0, 2}, {2, 3}};
  const auto result = Run(Spec());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->scope, Scope::kLayerEqual);
  const std::vector<HeadObservation> first = {observations_.begin() + 1, observations_.end()};
  OperationResult part = *result;
  part.layers = {result->layers[0], result->layers[1]};
  ExpectKept(part, ObservationScores(prompt_, first, {}));
  part.layers = {result->layers[2]};
  ExpectKept(part, ObservationScores(prompt_, {observations_[0]}, {}));
}

TEST_F(ObservationHeadsTest, ScopeSequenceMergesGroupsAsOftenAsTheyHaveLayers) {
  settings_.layer_groups = {{0, 2}, {2, 3}};
  OperationSpec spec = Spec();
  spec.scope = Scope::kSequence;
  const auto result = Run(spec);
  ASSERT_TRUE(result.ok()) << result.status();
  const Scores first =
      ObservationScores(prompt_, {observations_.begin() + 1, observations_.end()}, {});
  Scores merged = ObservationScores(prompt_, {observations_[0]}, {});
  for (size_t t = 0; t < merged.size(); ++t) merged[t] = (2 * first[t] + merged[t]) / 3;
  ExpectKept(*result, merged);
}

}  // namespace
}  // namespace keepset::engine
