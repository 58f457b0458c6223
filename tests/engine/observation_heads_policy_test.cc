// What observation_heads asks for, the layers that may be left out, and what it refuses.
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/status_macros.h"
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

// Layers whose q_window and window_lse hold `heads` alone.
class SomeHeads : public ObservationHeadsTest {
 protected:
  absl::StatusOr<OperationResult> RunWith(const OperationSpec& spec,
                                          const std::vector<int64_t>& heads, bool with_lse) {
    KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<Operation> operation, bench_.Begin(spec));
    for (int64_t layer = 0; layer < prompt_.shape().num_layers; ++layer) {
      const std::vector<float> all_lse = prompt_.window_lse(layer);
      LayerObservation observation =
          with_lse ? prompt_.observation(layer, all_lse) : prompt_.observation(layer);
      const int64_t head_bytes =
          observation.q_window.size_bytes / observation.q_window.num_qo_heads;
      std::vector<std::byte> queries;
      std::vector<float> lse;
      for (const int64_t head : heads) {
        const std::byte* const from = observation.q_window.data + head * head_bytes;
        queries.insert(queries.end(), from, from + head_bytes);
        const auto rows = all_lse.begin() + head * prompt_.shape().num_rows;
        lse.insert(lse.end(), rows, rows + prompt_.shape().num_rows);
      }
      observation.qo_heads = heads;
      observation.q_window.data = queries.data();
      observation.q_window.size_bytes = static_cast<int64_t>(queries.size());
      observation.q_window.num_qo_heads = static_cast<int64_t>(heads.size());
      if (with_lse) {
        observation.window_lse.data = reinterpret_cast<const std::byte*>(lse.data());
        observation.window_lse.size_bytes = static_cast<int64_t>(lse.size() * sizeof(float));
        observation.window_lse.num_qo_heads = static_cast<int64_t>(heads.size());
      }
      KEEPSET_RETURN_IF_ERROR(operation->Observe(layer, observation));
    }
    KEEPSET_ASSIGN_OR_RETURN(const OperationResult* result, operation->Finish());
    return *result;
  }
};

TEST_F(SomeHeads, QueriesOfTheListedHeadsAreEnough) {
  observations_ = {{2, 3, ObservedRows::kMaxRows, 1.0f},
                   {0, 1, ObservedRows::kLastRow, 0.5f},
                   {0, 3, ObservedRows::kMeanRows, 0.75f}};
  const auto whole = Run(Spec());
  ASSERT_TRUE(whole.ok()) << whole.status();
  for (const std::vector<int64_t>& heads : {std::vector<int64_t>{1, 3}, {0, 1, 3}, {0, 1, 2, 3}}) {
    for (const bool with_lse : {false, true}) {
      const auto part = RunWith(Spec(), heads, with_lse);
      ASSERT_TRUE(part.ok()) << part.status();
      EXPECT_EQ(part->layers[0].keep_indices, whole->layers[0].keep_indices);
    }
  }
}

TEST_F(SomeHeads, AHeadThatObservesMustBeAmongThem) {
  observations_ = {{1, 2, ObservedRows::kLastRow, 1.0f}};
  const absl::Status status = RunWith(Spec(), {1, 3}, false).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer 1: qo_heads has no head 2"));
}

TEST_F(SomeHeads, AreAscendingHeadsOfTheModel) {
  observations_ = {{1, 1, ObservedRows::kLastRow, 1.0f}};
  const absl::Status twice = RunWith(Spec(), {1, 1}, false).status();
  EXPECT_THAT(std::string(twice.message()), HasSubstr("layer 0: qo_heads[1]=1, want 2..3"));
}

TEST_F(SomeHeads, AreRefusedByAPolicyThatReadsThemAll) {
  OperationSpec spec = Spec();
  spec.policy = "snapkv";
  spec.table = nullptr;
  const absl::Status status = RunWith(spec, {0, 1}, false).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("layer 0: qo_heads: policy snapkv reads all 4 query heads"));
}

}  // namespace
}  // namespace keepset::engine
