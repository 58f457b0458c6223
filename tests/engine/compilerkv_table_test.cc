// Which cell of its table compilerkv reads, and from which signals.
#include <cmath>
#include <string>

#include "engine/input_needs.h"
#include "engine/policies/policy_registry.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/compilerkv_test_support.h"

namespace keepset::engine {
namespace {

using testing::CompilerKvSample;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(CompilerKvPolicy, MissingPplIsRefusedWhenTheTableAsksForIt) {
  CompilerKvSample sample;
  sample.table.ppl_edges = {5.0f, 10.0f, 30.0f};
  sample.Reset();
  EXPECT_EQ(sample.BeginStatus().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(sample.BeginStatus().message(),
              HasSubstr("missing ppl, want ppl or window_logprobs, or parameter "
                        "missing_ppl=median"));
}

TEST(CompilerKvPolicy, NeedsSayWhetherTheTableAsksForPpl) {
  CompilerKvSample sample;
  EXPECT_FALSE(DescribeNeeds(sample.spec, *NewBuiltinPolicyRegistry())->ppl);
  sample.table.ppl_edges = {5.0f, 10.0f, 30.0f};
  sample.Reset();
  EXPECT_TRUE(DescribeNeeds(sample.spec, *NewBuiltinPolicyRegistry())->ppl);
}

TEST(CompilerKvPolicy, MissingPplIsTheMedianEdgeWhenAskedAndReported) {
  CompilerKvSample sample;
  sample.table.ppl_edges = {5.0f, 10.0f, 30.0f};
  sample.Reset();
  sample.spec.parameters["missing_ppl"] = "median";
  const OperationResult result = sample.Run();
  EXPECT_EQ(*result.ppl, 10.0);
  EXPECT_EQ(*result.ppl_bin, 2);
  EXPECT_THAT(result.defaulted_inputs, ElementsAre("ppl"));
}

TEST(CompilerKvPolicy, MedianOfTwoEdgesIsTheirMean) {
  CompilerKvSample sample;
  sample.table.ppl_edges = {4.0f, 10.0f};
  sample.Reset();
  sample.spec.parameters["missing_ppl"] = "median";
  EXPECT_EQ(*sample.Run().ppl, 7.0);
}

TEST(CompilerKvPolicy, TableWithoutPplAxisNeedsNoPpl) {
  CompilerKvSample sample;
  const OperationResult result = sample.Run();
  EXPECT_FALSE(result.ppl.has_value());
  EXPECT_FALSE(result.ppl_bin.has_value());
  EXPECT_THAT(result.defaulted_inputs, IsEmpty());
}

TEST(CompilerKvPolicy, PplComesFromLogProbabilities) {
  CompilerKvSample sample;
  sample.table.ppl_edges = {5.0f, 10.0f};
  sample.Reset();
  sample.spec.window_logprobs = {-std::log(4.0f), -std::log(16.0f)};
  const OperationResult result = sample.Run();
  EXPECT_NEAR(*result.ppl, 8.0, 1e-5);
  EXPECT_EQ(*result.ppl_bin, 1);
}

TEST(CompilerKvPolicy, OnlyLogProbabilitiesOfTheWindowCount) {
  CompilerKvSample sample;
  sample.table.ppl_edges = {5.0f, 10.0f};
  sample.Reset();
  sample.spec.parameters["window"] = "2";
  sample.spec.window_logprobs = {-50.0f, -std::log(4.0f), -std::log(16.0f)};
  EXPECT_NEAR(*sample.Run().ppl, 8.0, 1e-5);
}

TEST(CompilerKvPolicy, GivenPplWinsOverLogProbabilities) {
  CompilerKvSample sample;
  sample.spec.ppl = 3.0;
  sample.spec.window_logprobs = {-1.0f};
  EXPECT_EQ(*sample.Run().ppl, 3.0);
}

TEST(CompilerKvPolicy, GateFollowsEntropyAndPplBins) {
  CompilerKvSample sample;
  sample.table.entropy_edges = {0.01f};
  sample.table.ppl_edges = {5.0f};
  // [L][E][P]; entropy lies above the edge.
  sample.table.gate_thresholds = {0.80f, 0.81f, 0.82f, 0.83f, 0.84f, 0.85f,
                                  0.86f, 0.87f, 0.88f, 0.89f, 0.90f, 0.91f};
  sample.Reset();
  sample.spec.ppl = 5.0;
  const OperationResult result = sample.Run();
  EXPECT_EQ(*result.entropy_bin, 1);
  EXPECT_EQ(*result.ppl_bin, 1);
  EXPECT_FLOAT_EQ(static_cast<float>(*result.layers[0].tau), 0.83f);
  EXPECT_FLOAT_EQ(static_cast<float>(*result.layers[1].tau), 0.87f);
  EXPECT_FLOAT_EQ(static_cast<float>(*result.layers[2].tau), 0.91f);
}

TEST(CompilerKvPolicy, MissingTableIsNotFound) {
  CompilerKvSample sample;
  sample.spec.table = nullptr;
  EXPECT_EQ(sample.BeginStatus().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(sample.BeginStatus().message(),
              HasSubstr("policy compilerkv needs a table of kind compilerkv, none given"));
}

TEST(CompilerKvPolicy, TableOfAnotherModelDoesNotFit) {
  CompilerKvSample sample;
  sample.spec.model.architecture = "OtherForCausalLM";
  EXPECT_EQ(sample.BeginStatus().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(sample.BeginStatus().message(), HasSubstr("architecture"));
}

TEST(CompilerKvPolicy, FingerprintMatchShapeIsReportedAsRelaxed) {
  CompilerKvSample sample;
  const std::string compiled_for = sample.spec.model.architecture;
  sample.spec.model.architecture = "OtherForCausalLM";
  sample.spec.parameters["fingerprint_match"] = "shape";
  const OperationResult result = sample.Run();
  EXPECT_THAT(result.relaxed,
              ElementsAre("fingerprint_match: architecture is \"" + compiled_for +
                          "\" in the table and \"OtherForCausalLM\" in the request"));
}

TEST(CompilerKvPolicy, FewerLayersThanTheTableNeedInterpolation) {
  CompilerKvSample sample;
  tables::ModelFingerprint deeper = sample.prompt.model();
  deeper.num_layers = 5;
  fakes::TableSample table;
  sample.spec.table = fakes::MakeTable(deeper, table);
  EXPECT_EQ(sample.BeginStatus().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(sample.BeginStatus().message(), HasSubstr("num_layers"));
  sample.spec.parameters["layer_match"] = "interpolate_depth";
  EXPECT_THAT(sample.Run().relaxed, ElementsAre(HasSubstr("layer_match")));
}

TEST(CompilerKvPolicy, BudgetIsLookedUpAsRequestedBeforeTheClamp) {
  CompilerKvSample sample;
  sample.table.budgets = {512};
  sample.Reset();
  sample.spec.budget.tokens = 512;
  const OperationResult result = sample.Run();
  EXPECT_EQ(result.reason, Reason::kBelowBudget);
  EXPECT_EQ(result.budget_tokens, 512);
}

TEST(CompilerKvPolicy, BudgetThatIsNotCompiledListsTheCompiledOnes) {
  CompilerKvSample sample;
  sample.table.budgets = {16, 32};
  sample.Reset();
  EXPECT_EQ(sample.BeginStatus().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(sample.BeginStatus().message(), HasSubstr("16, 32"));
}

TEST(CompilerKvPolicy, NearestBudgetIsReportedAsRelaxed) {
  CompilerKvSample sample;
  sample.table.budgets = {16, 32};
  sample.Reset();
  sample.spec.parameters["table_budget"] = "nearest";
  EXPECT_THAT(sample.Run().relaxed, ElementsAre(HasSubstr("20 served by 16")));
}

TEST(CompilerKvPolicy, TableBudgetIsTheDefaultBudget) {
  CompilerKvSample sample;
  sample.table.budgets = {16};
  sample.Reset();
  sample.spec.budget = {};
  EXPECT_EQ(sample.Run().budget_tokens, 16);
}

TEST(CompilerKvPolicy, WindowPplThatOverflowsIsRefused) {
  CompilerKvSample sample;
  sample.spec.parameters["window"] = "1";
  sample.spec.window_logprobs = {0.0f, 0.0f, -1000.0f};
  EXPECT_EQ(sample.BeginStatus().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(sample.BeginStatus().message(), HasSubstr("ppl=inf of the last 1 window_logprobs"));
}

}  // namespace
}  // namespace keepset::engine
