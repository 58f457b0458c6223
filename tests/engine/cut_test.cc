#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/run_operation.h"
#include "tests/fakes/scripted_policy.h"

namespace keepset::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsSupersetOf;

OperationResult RunScript(const fakes::Script& script, const OperationSpec& spec) {
  Bench bench(fakes::NewScriptedRegistry(script));
  absl::StatusOr<OperationResult> result = bench.Run(spec);
  EXPECT_TRUE(result.ok()) << result.status();
  return result.ok() ? *std::move(result) : OperationResult{};
}

OperationSpec SpecFor(const fakes::Script& script, int64_t budget, Scope scope) {
  OperationSpec spec = TensorlessSpec(
      "scripted", static_cast<int64_t>(script.scores.size()),
      static_cast<int64_t>(script.scores.front().size()) / script.score_rows, budget);
  spec.scope = scope;
  return spec;
}

// Candidates: layer 0 {1}, layer 1 {0, 1, 3}.
fakes::Script TwoGatedLayers() {
  fakes::Script script;
  script.scores = {{0.5f, 1.4f, 0.1f, 0.7f, 0.2f}, {1.0f, 2.0f, 0.1f, 1.5f, 0.2f}};
  script.score_kind = ScoreKind::kThreshold;
  script.taus = {0.9f, 0.9f};
  return script;
}

TEST(Cut, GateKeepsTheBestCandidateOfGoldenVectorTwo) {
  fakes::Script script;
  script.scores = {{0.95f, 1.4f, 1.1f}};
  script.score_kind = ScoreKind::kThreshold;
  script.taus = {0.9f};
  const OperationResult result = RunScript(script, SpecFor(script, 1, Scope::kLayerElastic));
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(1));
  EXPECT_EQ(result.layers[0].candidates[0], 3);
}

TEST(Cut, LayerElasticLeavesTheBudgetUnfilled) {
  const fakes::Script script = TwoGatedLayers();
  const OperationResult result = RunScript(script, SpecFor(script, 4, Scope::kLayerElastic));
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(1));
  EXPECT_THAT(result.layers[1].keep_indices[0], ElementsAre(0, 1, 3));
}

TEST(Cut, LayerEqualTakesTheLargestCandidateCountAndReportsFilled) {
  const fakes::Script script = TwoGatedLayers();
  const OperationResult result = RunScript(script, SpecFor(script, 4, Scope::kLayerEqual));
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(0, 1, 3));
  EXPECT_EQ(result.layers[0].filled[0], 2);
  EXPECT_THAT(result.layers[1].keep_indices[0], ElementsAre(0, 1, 3));
  EXPECT_EQ(result.layers[1].filled[0], 0);
}

TEST(Cut, LayerEqualClampsTheLargestCandidateCountToTheBudget) {
  const fakes::Script script = TwoGatedLayers();
  const OperationResult result = RunScript(script, SpecFor(script, 2, Scope::kLayerEqual));
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(1, 3));
  EXPECT_THAT(result.layers[1].keep_indices[0], ElementsAre(1, 3));
}

TEST(Cut, LayerEqualByMeanSpendsTheBytesOfLayerElastic) {
  const fakes::Script script = TwoGatedLayers();
  OperationSpec spec = SpecFor(script, 4, Scope::kLayerEqual);
  spec.parameters["equal_count"] = "mean";
  const OperationResult equal = RunScript(script, spec);
  EXPECT_THAT(equal.layers[0].keep_indices[0], ElementsAre(1, 3));
  EXPECT_THAT(equal.layers[1].keep_indices[0], ElementsAre(1, 3));
  EXPECT_EQ(equal.bytes_after,
            RunScript(script, SpecFor(script, 4, Scope::kLayerElastic)).bytes_after);
}

TEST(Cut, LayerEqualNeverKeepsFewerThanProtected) {
  fakes::Script script = TwoGatedLayers();
  script.taus = {9.0f, 9.0f};
  OperationSpec spec = SpecFor(script, 4, Scope::kLayerEqual);
  spec.protect_sink = 3;
  const OperationResult result = RunScript(script, spec);
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(0, 1, 2));
  EXPECT_THAT(result.layers[1].keep_indices[0], ElementsAre(0, 1, 2));
}

TEST(Cut, LayerEqualLosesNothingTheGateKeptBesideProtectedPositions) {
  const fakes::Script script = TwoGatedLayers();
  OperationSpec spec = SpecFor(script, 4, Scope::kLayerElastic);
  spec.protect_spans = {{"a", 2, 3}, {"b", 4, 5}};
  const OperationResult elastic = RunScript(script, spec);
  spec.scope = Scope::kLayerEqual;
  const OperationResult equal = RunScript(script, spec);
  for (int64_t layer = 0; layer < 2; ++layer) {
    const std::vector<int32_t>& kept = equal.layers[layer].keep_indices[0];
    EXPECT_THAT(kept, IsSupersetOf(elastic.layers[layer].keep_indices[0]));
    EXPECT_EQ(kept.size(), 4u);
  }
}

TEST(Cut, LayerEqualByMeanSpendsTheBytesOfLayerElasticBesideProtectedPositions) {
  const fakes::Script script = TwoGatedLayers();
  OperationSpec spec = SpecFor(script, 4, Scope::kLayerElastic);
  spec.protect_spans = {{"a", 2, 3}};
  const OperationResult elastic = RunScript(script, spec);
  spec.scope = Scope::kLayerEqual;
  spec.parameters["equal_count"] = "mean";
  EXPECT_EQ(RunScript(script, spec).bytes_after, elastic.bytes_after);
}

TEST(Cut, BestPositionStaysWhenNoneReachesTheThreshold) {
  fakes::Script script = TwoGatedLayers();
  script.taus = {9.0f, 9.0f};
  const OperationResult result = RunScript(script, SpecFor(script, 4, Scope::kLayerElastic));
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(1));
  EXPECT_EQ(result.layers[0].filled[0], 1);
  EXPECT_EQ(result.layers[0].candidates[0], 0);
}

TEST(Cut, MinKeptBestPositionsStayBelowTheThreshold) {
  fakes::Script script = TwoGatedLayers();
  script.taus = {9.0f, 9.0f};
  script.min_kept = 2;
  const OperationResult result = RunScript(script, SpecFor(script, 4, Scope::kLayerElastic));
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(1, 3));
  EXPECT_EQ(result.layers[0].filled[0], 2);
}

TEST(Cut, SequenceMergesLayersByMeanAndListsTheSamePositions) {
  const fakes::Script script = TwoGatedLayers();
  const OperationResult result = RunScript(script, SpecFor(script, 2, Scope::kSequence));
  // Means {0.75, 1.7, 0.1, 1.1, 0.2}.
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(1, 3));
  EXPECT_EQ(result.layers[0].keep_indices, result.layers[1].keep_indices);
  EXPECT_EQ(result.layers[0].candidates[0], 2);
}

TEST(Cut, SequenceGatesWithTheMeanOfTheThresholds) {
  fakes::Script script = TwoGatedLayers();
  script.taus = {1.0f, 2.0f};
  const OperationResult result = RunScript(script, SpecFor(script, 4, Scope::kSequence));
  EXPECT_DOUBLE_EQ(*result.layers[0].tau, 1.5);
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(1));
}

TEST(Cut, SequenceMergesNegativeScoresByMaximum) {
  fakes::Script script;
  script.scores = {{-5.0f, -1.0f, -4.0f}, {-2.0f, -6.0f, -3.0f}};
  OperationSpec spec = SpecFor(script, 2, Scope::kSequence);
  spec.parameters["layer_merge"] = "max";
  const OperationResult result = RunScript(script, spec);
  EXPECT_THAT(result.layers[1].keep_indices[0], ElementsAre(0, 1));
}

TEST(Cut, SequenceOfAGlobalPolicyCutsTheSameSetInEveryLayer) {
  fakes::Script script = TwoGatedLayers();
  script.locality = Locality::kGlobal;
  const OperationResult result = RunScript(script, SpecFor(script, 2, Scope::kSequence));
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(1, 3));
  EXPECT_EQ(result.layers[0].keep_indices, result.layers[1].keep_indices);
}

// Two heads of three positions: means {2, 2.5, 2}, maxima {3, 4, 2}.
fakes::Script TwoHeads() {
  fakes::Script script;
  script.scores = {{3.0f, 1.0f, 2.0f, 1.0f, 4.0f, 2.0f}};
  script.score_rows = 2;
  script.native_scope = Scope::kKvHead;
  return script;
}

TEST(Cut, KvHeadScopeCutsEachHeadApart) {
  const fakes::Script script = TwoHeads();
  const OperationResult result = RunScript(script, SpecFor(script, 1, Scope::kKvHead));
  ASSERT_EQ(result.layers[0].keep_indices.size(), 2u);
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(0));
  EXPECT_THAT(result.layers[0].keep_indices[1], ElementsAre(1));
}

TEST(Cut, KvHeadScopeListsASharedSetForEveryHead) {
  fakes::Script script = TwoHeads();
  script.score_rows = 1;
  const OperationResult result = RunScript(script, SpecFor(script, 1, Scope::kKvHead));
  ASSERT_EQ(result.layers[0].keep_indices.size(), 2u);
  EXPECT_EQ(result.layers[0].keep_indices[0], result.layers[0].keep_indices[1]);
}

TEST(Cut, HeadsAreMergedByMeanByDefault) {
  const fakes::Script script = TwoHeads();
  const OperationResult result = RunScript(script, SpecFor(script, 2, Scope::kLayerEqual));
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(0, 1));
}

TEST(Cut, HeadsAreMergedByMaximumWhenAsked) {
  fakes::Script script = TwoHeads();
  script.scores = {{3.0f, 1.0f, 2.9f, 1.0f, 2.0f, 2.9f}};
  OperationSpec spec = SpecFor(script, 1, Scope::kLayerEqual);
  EXPECT_THAT(RunScript(script, spec).layers[0].keep_indices[0], ElementsAre(2));
  spec.parameters["head_merge"] = "max";
  EXPECT_THAT(RunScript(script, spec).layers[0].keep_indices[0], ElementsAre(0));
}

TEST(Cut, DilationKeepsThePositionsAfterAHit) {
  fakes::Script script;
  script.scores = {{0.0f, 9.0f, 0.0f, 1.0f, 2.0f, 0.0f}};
  OperationSpec spec = SpecFor(script, 3, Scope::kLayerElastic);
  EXPECT_THAT(RunScript(script, spec).layers[0].keep_indices[0], ElementsAre(1, 3, 4));
  spec.parameters["dilate"] = "2";
  EXPECT_THAT(RunScript(script, spec).layers[0].keep_indices[0], ElementsAre(1, 2, 3));
}

TEST(Cut, DilationIsAppliedOnceInLayerEqualOfAThresholdPolicy) {
  fakes::Script script;
  script.scores = {{0.0f, 9.0f, 0.0f, 0.0f, 0.0f, 0.0f}};
  script.score_kind = ScoreKind::kThreshold;
  script.taus = {1.0f};
  OperationSpec spec = SpecFor(script, 5, Scope::kLayerEqual);
  spec.parameters["dilate"] = "1";
  EXPECT_THAT(RunScript(script, spec).layers[0].keep_indices[0], ElementsAre(1, 2));
}

TEST(Cut, TiesGoToTheLowerPosition) {
  fakes::Script script;
  script.scores = {{1.0f, 1.0f, 1.0f, 1.0f}};
  const OperationResult result = RunScript(script, SpecFor(script, 2, Scope::kLayerElastic));
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(0, 1));
}

TEST(Cut, ProtectedPositionsCountAgainstTheBudget) {
  fakes::Script script;
  script.scores = {{0.0f, 9.0f, 8.0f, 7.0f, 6.0f, 0.0f}};
  OperationSpec spec = SpecFor(script, 3, Scope::kLayerElastic);
  spec.protect_sink = 1;
  spec.protect_window = 1;
  EXPECT_THAT(RunScript(script, spec).layers[0].keep_indices[0], ElementsAre(0, 1, 5));
}

TEST(Cut, OverlappingProtectedRangesCountOnce) {
  fakes::Script script;
  script.scores = {{0.0f, 0.0f, 0.0f, 7.0f, 6.0f, 0.0f}};
  OperationSpec spec = SpecFor(script, 4, Scope::kLayerElastic);
  spec.protect_sink = 2;
  spec.protect_spans = {{"system", 1, 3}, {"again", 0, 3}};
  EXPECT_THAT(RunScript(script, spec).layers[0].keep_indices[0], ElementsAre(0, 1, 2, 3));
}

TEST(Cut, ForcedPositionsGiveWayToProtectedOnesFromTheOldestOn) {
  fakes::Script script;
  script.scores = {{9.0f, 8.0f, 7.0f, 6.0f, 5.0f, 4.0f}};
  script.forced = {{2, 3}, {4, 6}};
  OperationSpec spec = SpecFor(script, 3, Scope::kLayerElastic);
  spec.protect_sink = 1;
  EXPECT_THAT(RunScript(script, spec).layers[0].keep_indices[0], ElementsAre(0, 4, 5));
}

TEST(Cut, ThresholdPolicyReportsTauAndCandidates) {
  const fakes::Script script = TwoGatedLayers();
  const OperationResult result = RunScript(script, SpecFor(script, 4, Scope::kLayerElastic));
  EXPECT_TRUE(result.has_candidates);
  EXPECT_FLOAT_EQ(static_cast<float>(*result.layers[0].tau), 0.9f);
}

TEST(Cut, RankingPolicyReportsNoTau) {
  const fakes::Script script = TwoHeads();
  const OperationResult result = RunScript(script, SpecFor(script, 1, Scope::kKvHead));
  EXPECT_FALSE(result.has_candidates);
  EXPECT_FALSE(result.layers[0].tau.has_value());
}

TEST(Cut, UnknownSharedParameterIsRefusedByName) {
  const fakes::Script script = TwoGatedLayers();
  Bench bench(fakes::NewScriptedRegistry(script));
  OperationSpec spec = SpecFor(script, 2, Scope::kLayerElastic);
  spec.parameters["head_merge"] = "mean";
  const absl::Status status = bench.Run(spec).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(),
              HasSubstr("unknown parameter head_merge=mean, known are dilate, equal_count, "
                        "layer_merge"));
}

}  // namespace
}  // namespace keepset::engine
