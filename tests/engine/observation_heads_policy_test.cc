// What observation_heads asks for, the layers that may be left out, and what it refuses.
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "engine/input_needs.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/observation_heads_test_support.h"

namespace keepset::engine {
namespace {

using tables::ObservedRows;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::ObservationHeadsTest;

TEST_F(ObservationHeadsTest, WeightsOfZeroAreNotLookedAt) {
  observations_.push_back({1, 0, ObservedRows::kMaxRows, 0.0f});
  const auto result = Run(Spec(), /*left_out=*/{1});
  ASSERT_TRUE(result.ok()) << result.status();
}

TEST_F(ObservationHeadsTest, LayersTheTableDoesNotNameMayBeLeftOut) {
  const auto with = Run(Spec());
  const auto without = Run(Spec(), /*left_out=*/{1});
  ASSERT_TRUE(with.ok() && without.ok()) << without.status();
  EXPECT_EQ(with->layers[1].keep_indices, without->layers[1].keep_indices);
}

TEST_F(ObservationHeadsTest, NothingOfAnUnnamedLayerIsAskedFor) {
  const auto operation = bench_.Begin(Spec());
  ASSERT_TRUE(operation.ok());
  ASSERT_TRUE((*operation)->Observe(0, prompt_.observation(0)).ok());
  EXPECT_TRUE((*operation)->Observe(1, LayerObservation()).ok());
  EXPECT_TRUE((*operation)->Observe(2, prompt_.observation(2)).ok());
  EXPECT_TRUE((*operation)->Finish().ok());
}

TEST_F(ObservationHeadsTest, ALayerThatObservesAndIsNotSentIsNamed) {
  const auto operation = bench_.Begin(Spec());
  ASSERT_TRUE(operation.ok());
  EXPECT_THAT(std::string((*operation)->Observe(2, prompt_.observation(2)).message()),
              HasSubstr("layer 2: out of order, want layer 0"));
  ASSERT_TRUE((*operation)->Observe(0, prompt_.observation(0)).ok());
  const absl::Status status = (*operation)->Finish().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer 2: not observed"));
}

TEST_F(ObservationHeadsTest, ALayerOfNoveltyAloneNeedsNoQueries) {
  observations_ = {{1, 0, ObservedRows::kKeyNovelty, 1.0f}};
  OperationSpec spec = Spec();
  spec.num_rows = 0;
  spec.softmax_scale = 0.0f;
  const auto operation = bench_.Begin(spec);
  ASSERT_TRUE(operation.ok()) << operation.status();
  LayerObservation keys;
  keys.k = prompt_.observation(1).k;
  EXPECT_TRUE((*operation)->Observe(1, keys).ok());
  EXPECT_TRUE((*operation)->Finish().ok());
}

TEST_F(ObservationHeadsTest, QueriesOfAnObservingLayerAreAskedFor) {
  const auto operation = bench_.Begin(Spec());
  ASSERT_TRUE(operation.ok());
  LayerObservation observation = prompt_.observation(0);
  observation.q_window = {};
  EXPECT_THAT(std::string((*operation)->Observe(0, observation).message()),
              HasSubstr("layer 0: missing q_window"));
}

TEST_F(ObservationHeadsTest, ARefusedLayerLeavesNoTrace) {
  const auto want = Run(Spec());
  const auto operation = bench_.Begin(Spec());
  ASSERT_TRUE(want.ok() && operation.ok());
  fakes::SyntheticPrompt bad = prompt_;
  bad.set_k(0, 1, 50, 0, std::numeric_limits<float>::quiet_NaN());
  EXPECT_EQ((*operation)->Observe(0, bad.observation(0)).code(),
            absl::StatusCode::kInvalidArgument);
  for (const int64_t layer : {0, 2}) {
    ASSERT_TRUE((*operation)->Observe(layer, prompt_.observation(layer)).ok());
  }
  EXPECT_EQ((*(*operation)->Finish())->layers[0].keep_indices, want->layers[0].keep_indices);
}

TEST_F(ObservationHeadsTest, AnotherModelsTableIsRefused) {
  OperationSpec spec = Spec();
  spec.model.num_layers = 2;
  ExpectRefused(spec, absl::StatusCode::kFailedPrecondition, "num_layers");
}

TEST_F(ObservationHeadsTest, ATableOfAnotherKindIsRefused) {
  OperationSpec spec = Spec();
  spec.table = fakes::MakeTable(prompt_.model(), {});
  ExpectRefused(spec, absl::StatusCode::kFailedPrecondition, "want observation_heads");
}

TEST_F(ObservationHeadsTest, NoTableIsNotFound) {
  OperationSpec spec = Spec();
  spec.table = nullptr;
  ExpectRefused(spec, absl::StatusCode::kNotFound, "none given");
}

TEST_F(ObservationHeadsTest, ObservedRowsOutsideThePromptAreRefused) {
  OperationSpec spec = Spec();
  spec.parameters["observe"] = "90:97";
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument, "inside the prompt of 96 positions");
}

TEST_F(ObservationHeadsTest, ARowOfTheSpanThatWasNotSentIsNamed) {
  OperationSpec spec = Spec();
  spec.parameters["observe"] = "80:92";
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument,
                "observe=80:92: position 80 is not among row_positions");
}

TEST_F(ObservationHeadsTest, RowsTheTableNeedsAndNobodySentAreNamed) {
  OperationSpec spec = Spec();
  spec.num_rows = 0;
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument,
                "layer 0 head 2 observes mean_rows, want at least one observed row");
}

TEST_F(ObservationHeadsTest, RowsBehindThePromptNeedAProbeInTheTable) {
  OperationSpec spec = Spec();
  spec.row_positions = {90, 91, 92, 93, 94, 95, 96, 97};
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument,
                "row_positions[6]=96, want 0..95: table heads names no probe");
}

TEST_F(ObservationHeadsTest, AProbeThatIsNamedAndAbsentIsRefused) {
  settings_.probe = tables::ObservationProbe{"recall", "What was said?"};
  observations_[0].rows = ObservedRows::kProbeMax;
  OperationSpec spec = Spec();
  spec.parameters["probe"] = "recall";
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument,
                "of probe recall, want rows of the probe");
}

TEST_F(ObservationHeadsTest, ProbeRowsSayWhichProbeTheyAre) {
  settings_.probe = tables::ObservationProbe{"recall", "What was said?"};
  observations_[0].rows = ObservedRows::kProbeMax;
  OperationSpec spec = Spec();
  spec.row_positions = {90, 91, 92, 93, 94, 95, 96, 97};
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument, "want parameter probe=recall");
  spec.parameters["probe"] = "other";
  ExpectRefused(spec, absl::StatusCode::kFailedPrecondition, "table heads wants probe recall");
}

TEST_F(ObservationHeadsTest, UnknownParametersAreRefused) {
  OperationSpec spec = Spec();
  spec.parameters["kernel_size"] = "5";
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument, "unknown parameter kernel_size");
}

TEST_F(ObservationHeadsTest, AMalformedObserveIsRefused) {
  for (const char* text : {"", "5", "5:5", "9:3", "-1:3", "a:b", "1:2:3"}) {
    OperationSpec spec = Spec();
    spec.parameters["observe"] = text;
    ExpectRefused(spec, absl::StatusCode::kInvalidArgument, "want BEGIN:END");
  }
}

TEST_F(ObservationHeadsTest, SaysWhatAWorkerMustSend) {
  const auto needs = DescribeNeeds(Spec(), bench_.policies());
  ASSERT_TRUE(needs.ok()) << needs.status();
  ASSERT_EQ(needs->layers.size(), 2u);
  EXPECT_EQ(needs->layers[0].layer, 0);
  EXPECT_THAT(needs->layers[0].qo_heads, ElementsAre(2, 3));
  EXPECT_THAT(needs->layers[0].kv_heads, ElementsAre(1));
  EXPECT_TRUE(needs->layers[0].queries && needs->layers[0].keys && !needs->layers[0].values);
  EXPECT_THAT(needs->layers[1].qo_heads, ElementsAre(0));
  EXPECT_TRUE(needs->last_row && needs->observed_rows && !needs->probe_rows);
}

TEST_F(ObservationHeadsTest, NeedsOfOtherPoliciesAreWholeLayers) {
  OperationSpec spec = Spec();
  spec.policy = "snapkv";
  const auto needs = DescribeNeeds(spec, bench_.policies());
  ASSERT_TRUE(needs.ok()) << needs.status();
  EXPECT_EQ(needs->layers.size(), 3u);
  EXPECT_THAT(needs->layers[0].qo_heads, IsEmpty());
  spec.policy = "streaming_llm";
  EXPECT_THAT(DescribeNeeds(spec, bench_.policies())->layers, IsEmpty());
}

}  // namespace
}  // namespace keepset::engine
