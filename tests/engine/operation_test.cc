#include "engine/operation.h"

#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "tests/engine/operation_fixture.h"
#include "tests/engine/run_operation.h"
#include "tests/fakes/gated_backend.h"
#include "tests/fakes/scripted_policy.h"

namespace keepset::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST_F(OperationTest, LayerOutOfOrderIsRefusedNamingTheExpectedOne) {
  const auto operation = Begin(Spec("snapkv", 10));
  ASSERT_TRUE(Observe(*operation, 0).ok());
  const absl::Status status = Observe(*operation, 2);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "layer 2: out of order, want layer 1");
}

TEST_F(OperationTest, LayerGivenTwiceIsRefused) {
  const auto operation = Begin(Spec("snapkv", 10));
  ASSERT_TRUE(Observe(*operation, 0).ok());
  EXPECT_EQ(Observe(*operation, 0).message(), "layer 0: out of order, want layer 1");
}

TEST_F(OperationTest, LayerAfterTheLastIsRefused) {
  const auto operation = Observed(Spec("snapkv", 10));
  EXPECT_EQ(operation->Observe(3, prompt_.observation(0)).message(),
            "layer 3: all 3 layers were observed, want Finish");
}

TEST_F(OperationTest, FinishWithMissingLayersIsRefused) {
  const auto operation = Begin(Spec("snapkv", 10));
  ASSERT_TRUE(Observe(*operation, 0).ok());
  const absl::Status status = operation->Finish().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("want layers 1..2 before Finish"));
}

TEST_F(OperationTest, LayersOfWhichNothingIsReadMayBeLeftOut) {
  const OperationSpec spec = Spec("random", 10);
  const auto whole = Observed(spec);
  const auto none = Begin(spec);
  const auto last = Begin(spec);
  ASSERT_TRUE(Observe(*last, 2).ok());
  const auto want = whole->Finish();
  ASSERT_TRUE(want.ok());
  for (const auto& operation : {none.get(), last.get()}) {
    const auto result = operation->Finish();
    ASSERT_TRUE(result.ok()) << result.status();
    for (size_t layer = 0; layer < 3; ++layer) {
      EXPECT_EQ((*result)->layers[layer].keep_indices, (*want)->layers[layer].keep_indices);
    }
  }
}

TEST_F(OperationTest, RefusedObservationMayBeRepeated) {
  for (const char* policy : {"snapkv", "compilerkv"}) {
    OperationSpec spec = Spec(policy, 10);
    spec.table = fakes::MakeTable(prompt_.model(), {});
    const absl::StatusOr<OperationResult> expected = bench_.Run(spec, prompt_);
    ASSERT_TRUE(expected.ok());
    const auto operation = Begin(spec);
    for (int64_t layer = 0; layer < 3; ++layer) {
      fakes::SyntheticPrompt damaged = prompt_;
      damaged.set_v(layer, 1, 5, 0, std::numeric_limits<float>::quiet_NaN());
      damaged.set_k(layer, 1, 5, 0, std::numeric_limits<float>::quiet_NaN());
      const absl::Status status = operation->Observe(layer, damaged.observation(layer));
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(status.message(), HasSubstr("layer " + std::to_string(layer)));
      EXPECT_THAT(status.message(), HasSubstr("5"));
      ASSERT_TRUE(Observe(*operation, layer).ok());
    }
    const auto result = operation->Finish();
    ASSERT_TRUE(result.ok());
    for (int64_t layer = 0; layer < 3; ++layer) {
      EXPECT_EQ((*result)->layers[layer].keep_indices, expected->layers[layer].keep_indices);
    }
  }
}

TEST_F(OperationTest, NanInValuesAloneIsRefusedWithLayerAndPosition) {
  OperationSpec spec = Spec("compilerkv", 10);
  spec.table = fakes::MakeTable(prompt_.model(), {});
  prompt_.set_v(0, 1, 42, 3, std::numeric_limits<float>::infinity());
  const auto operation = Begin(spec);
  const absl::Status status = Observe(*operation, 0);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("layer 0: v"));
  EXPECT_THAT(status.message(), HasSubstr("42"));
}

TEST_F(OperationTest, NanInQueriesIsRefused) {
  prompt_.set_q(0, 1, 2, 3, std::numeric_limits<float>::quiet_NaN());
  const auto operation = Begin(Spec("snapkv", 10));
  const absl::Status status = Observe(*operation, 0);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("layer 0"));
}

TEST_F(OperationTest, FailedScoreLeavesTheOperationUsable) {
  fakes::Script script;
  script.scores = {{1.0f, 2.0f}, {3.0f, 4.0f}};
  script.failing_layer = 1;
  Bench bench(fakes::NewScriptedRegistry(script));
  auto operation = bench.Begin(TensorlessSpec("scripted", 2, 2, 1));
  ASSERT_TRUE(operation.ok());
  ASSERT_TRUE((*operation)->Observe(0, {}).ok());
  EXPECT_EQ((*operation)->Observe(1, {}).message(), "layer 1: scripted failure");
  EXPECT_TRUE((*operation)->Observe(1, {}).ok());
  EXPECT_TRUE((*operation)->Finish().ok());
}

// So that others pass between two pieces: 4 query heads of 2^22 positions are half of what is taken
// at once.
TEST_F(OperationTest, LayersOfLongPromptsAreTakenInSmallPieces) {
  fakes::Gate gate;
  Bench bench(NewCpuBackendOfManyLayers(gate, 8));
  const auto pieces = [&](int64_t seq_len) {
    const auto operation = bench.Begin(TensorlessSpec("random", 8, seq_len, 10));
    EXPECT_TRUE(operation.ok()) << operation.status();
    return (*operation)->layers_at_once();
  };
  EXPECT_EQ(pieces(96), 8);
  EXPECT_EQ(pieces(int64_t{1} << 22), 2);
  EXPECT_EQ(pieces(int64_t{1} << 23), 1);
}

TEST_F(OperationTest, LayersTogetherStopAtThePassedDeadline) {
  fakes::Gate gate;
  Bench bench(NewCpuBackendOfManyLayers(gate, 8));
  OperationSpec spec = Spec("snapkv", 10);
  spec.deadline = absl::Seconds(1);
  bench.clock().Advance(absl::Seconds(2));
  const auto result = bench.RunTogether(spec, prompt_);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->reason, Reason::kDeadline);
}

TEST_F(OperationTest, FinishIsIdempotent) {
  const auto operation = Observed(Spec("snapkv", 10));
  const auto first = operation->Finish();
  const auto second = operation->Finish();
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(*first, *second);
}

TEST_F(OperationTest, ObservingAFinishedOperationIsRefused) {
  const auto operation = Observed(Spec("snapkv", 10));
  ASSERT_TRUE(operation->Finish().ok());
  EXPECT_EQ(Observe(*operation, 0).code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(OperationTest, BudgetOfThePromptKeepsEverythingWithoutLookingAtValues) {
  prompt_.set_k(0, 0, 0, 0, std::numeric_limits<float>::quiet_NaN());
  const auto operation = Observed(Spec("snapkv", 96));
  const auto result = operation->Finish();
  ASSERT_TRUE(result.ok());
  EXPECT_EQ((*result)->outcome, Outcome::kKeptFull);
  EXPECT_EQ((*result)->reason, Reason::kBelowBudget);
  EXPECT_EQ((*result)->layers[2].keep_indices[1].size(), 96u);
  EXPECT_FALSE((*result)->has_candidates);
}

TEST_F(OperationTest, ShapesAreCheckedEvenBelowTheBudget) {
  const auto operation = Begin(Spec("snapkv", 96));
  LayerObservation observation = prompt_.observation(0);
  observation.k.seq_len = 95;
  EXPECT_EQ(operation->Observe(0, observation).message(), "layer 0: k: seq_len=95, want 96");
}

TEST_F(OperationTest, LayerLocalPoliciesAnswerWhileStreaming) {
  const auto operation = Begin(Spec("snapkv", 10));
  EXPECT_EQ(operation->EarlyResult(0), nullptr);
  ASSERT_TRUE(Observe(*operation, 0).ok());
  ASSERT_NE(operation->EarlyResult(0), nullptr);
  const auto early = operation->EarlyResult(0)->keep_indices;
  ASSERT_TRUE(Observe(*operation, 1).ok());
  ASSERT_TRUE(Observe(*operation, 2).ok());
  const auto result = operation->Finish();
  ASSERT_TRUE(result.ok());
  EXPECT_EQ((*result)->layers[0].keep_indices, early);
}

TEST_F(OperationTest, GlobalAlphaAnswersOnlyAtFinish) {
  OperationSpec spec = Spec("compilerkv", 10);
  spec.table = fakes::MakeTable(prompt_.model(), {});
  const auto operation = Observed(spec);
  EXPECT_EQ(operation->EarlyResult(2), nullptr);
}

TEST_F(OperationTest, OneSetForAllLayersAnswersOnlyAtFinish) {
  OperationSpec spec = Spec("snapkv", 10);
  spec.scope = Scope::kSequence;
  const auto operation = Observed(spec);
  EXPECT_EQ(operation->EarlyResult(2), nullptr);
}

TEST_F(OperationTest, EqualCountsOfAThresholdPolicyAnswerOnlyAtFinish) {
  OperationSpec spec = Spec("compilerkv", 10);
  spec.table = fakes::MakeTable(prompt_.model(), {});
  spec.parameters["alpha_scope"] = "layer";
  spec.scope = Scope::kLayerEqual;
  const auto operation = Observed(spec);
  EXPECT_EQ(operation->EarlyResult(2), nullptr);
}

TEST_F(OperationTest, PassedDeadlineKeepsEverything) {
  OperationSpec spec = Spec("snapkv", 10);
  spec.deadline = absl::Seconds(1);
  const auto operation = Observed(spec);
  bench_.clock().Advance(absl::Seconds(1));
  const auto result = operation->Finish();
  ASSERT_TRUE(result.ok());
  EXPECT_EQ((*result)->outcome, Outcome::kKeptFull);
  EXPECT_EQ((*result)->reason, Reason::kDeadline);
}

TEST_F(OperationTest, LayersAfterTheDeadlineAreNotScored) {
  OperationSpec spec = Spec("snapkv", 10);
  spec.deadline = absl::Seconds(1);
  const auto operation = Begin(spec);
  ASSERT_TRUE(Observe(*operation, 0).ok());
  bench_.clock().Advance(absl::Seconds(2));
  prompt_.set_k(1, 0, 0, 0, std::numeric_limits<float>::quiet_NaN());
  EXPECT_TRUE(Observe(*operation, 1).ok());
  EXPECT_EQ(operation->EarlyResult(1), nullptr);
}

TEST_F(OperationTest, KeptFullByTheCallerEndsTheOperation) {
  const auto operation = Begin(Spec("snapkv", 10));
  ASSERT_TRUE(Observe(*operation, 0).ok());
  const OperationResult& result = operation->FinishKeptFull(Reason::kShed);
  EXPECT_EQ(result.outcome, Outcome::kKeptFull);
  EXPECT_EQ(result.reason, Reason::kShed);
  EXPECT_EQ(result.layers.size(), 3u);
  const auto again = operation->Finish();
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(*again, &result);
}

class BrokenDevice : public OperationTest {
 protected:
  BrokenDevice() : backend_(std::move(*kernels::NewBackend("cpu", {.num_threads = 1})), gate_) {}

  std::unique_ptr<Operation> BeginGated(const OperationSpec& spec) {
    auto operation = Operation::Begin(spec, bench_.policies(), backend_, bench_.clock());
    EXPECT_TRUE(operation.ok()) << operation.status();
    return *std::move(operation);
  }

  const absl::Status fault_ = absl::InternalError("cuda: illegal address");
  fakes::Gate gate_;
  fakes::GatedBackend backend_;
};

TEST_F(BrokenDevice, OperationKeepsEverything) {
  const auto operation = BeginGated(Spec("snapkv", 10));
  ASSERT_TRUE(Observe(*operation, 0).ok());
  gate_.BreakDevice(fault_);
  for (int64_t layer = 1; layer < operation->spec().model.num_layers; ++layer) {
    EXPECT_TRUE(Observe(*operation, layer).ok());
  }
  const auto result = operation->Finish();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ((*result)->outcome, Outcome::kKeptFull);
  EXPECT_EQ((*result)->reason, Reason::kDeviceFault);
}

TEST_F(BrokenDevice, FailureAtFinishKeepsEverything) {
  const auto operation = BeginGated(Spec("snapkv", 10));
  for (int64_t layer = 0; layer < operation->spec().model.num_layers; ++layer) {
    ASSERT_TRUE(Observe(*operation, layer).ok());
  }
  gate_.BreakDevice(fault_);
  const auto result = operation->Finish();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ((*result)->reason, Reason::kDeviceFault);
}

TEST_F(BrokenDevice, FailureInTheGatherTakesTheDecisionBack) {
  const auto operation = BeginGated(Spec("snapkv", 10));
  for (int64_t layer = 0; layer < operation->spec().model.num_layers; ++layer) {
    ASSERT_TRUE(Observe(*operation, layer).ok());
  }
  ASSERT_EQ((*operation->Finish())->outcome, Outcome::kCompressed);
  const OperationResult& result = operation->FinishKeptFull(Reason::kDeviceFault);
  EXPECT_EQ(result.outcome, Outcome::kKeptFull);
  EXPECT_EQ(result.reason, Reason::kDeviceFault);
  EXPECT_EQ(static_cast<int64_t>(result.layers[0].keep_indices[0].size()),
            operation->spec().seq_len);
  EXPECT_EQ(result.bytes_after, result.bytes_before);
}

TEST_F(BrokenDevice, NothingNewBegins) {
  gate_.BreakDevice(fault_);
  const auto operation =
      Operation::Begin(Spec("snapkv", 10), bench_.policies(), backend_, bench_.clock());
  EXPECT_EQ(operation.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(operation.status().message()), HasSubstr("illegal address"));
}

TEST_F(OperationTest, ShadowDecidesAndRefusesToGather) {
  OperationSpec spec = Spec("knorm", 10);
  spec.mode = Mode::kShadow;
  const auto operation = Observed(spec);
  const auto result = operation->Finish();
  ASSERT_TRUE(result.ok());
  EXPECT_EQ((*result)->outcome, Outcome::kShadow);
  EXPECT_EQ((*result)->layers[0].keep_indices[0].size(), 10u);
  const absl::Status status =
      operation->Gather(0, prompt_.observation(0).k, prompt_.observation(0).v, {}, {});
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("shadow"));
}

TEST_F(OperationTest, BytesCountKvHeadsOnly) {
  const auto operation = Observed(Spec("knorm", 10));
  const auto result = operation->Finish();
  ASSERT_TRUE(result.ok());
  // 3 layers x 2 KV heads x positions x (16 + 16) x 4 bytes.
  EXPECT_EQ((*result)->bytes_before, 3 * 2 * 96 * 32 * 4);
  EXPECT_EQ((*result)->bytes_after, 3 * 2 * 10 * 32 * 4);
}

TEST_F(OperationTest, BytesOfASharedSetCountEveryKvHead) {
  OperationSpec spec = Spec("knorm", 10);
  spec.scope = Scope::kLayerEqual;
  const auto operation = Observed(spec);
  const auto result = operation->Finish();
  ASSERT_TRUE(result.ok());
  EXPECT_EQ((*result)->bytes_after, 3 * 2 * 10 * 32 * 4);
}

TEST_F(OperationTest, ResultSaysPolicyScopeBudgetAndBackend) {
  const auto operation = Observed(Spec("snapkv", 10));
  const auto result = operation->Finish();
  ASSERT_TRUE(result.ok());
  EXPECT_EQ((*result)->policy, "snapkv");
  EXPECT_EQ((*result)->scope, Scope::kKvHead);
  EXPECT_EQ((*result)->budget_tokens, 10);
  EXPECT_EQ((*result)->backend, bench_.backend().name());
  EXPECT_FALSE((*result)->table.has_value());
}

TEST_F(OperationTest, ResultNamesTheTableItUsed) {
  OperationSpec spec = Spec("compilerkv", 10);
  spec.table = fakes::MakeTable(prompt_.model(), {});
  const auto operation = Observed(spec);
  const auto result = operation->Finish();
  ASSERT_TRUE(result.ok());
  EXPECT_EQ((*result)->table, spec.table->identity());
  EXPECT_EQ((*result)->table_source, "hand-written");
}

TEST_F(OperationTest, WindowLseGivesTheSameSets) {
  const OperationSpec spec = Spec("snapkv", 30);
  const absl::StatusOr<OperationResult> expected = bench_.Run(spec, prompt_);
  ASSERT_TRUE(expected.ok());
  const auto operation = Begin(spec);
  for (int64_t layer = 0; layer < spec.model.num_layers; ++layer) {
    const std::vector<float> lse = prompt_.window_lse(layer);
    ASSERT_TRUE(operation->Observe(layer, prompt_.observation(layer, lse)).ok());
  }
  const auto result = operation->Finish();
  ASSERT_TRUE(result.ok());
  EXPECT_EQ((*result)->layers[1].keep_indices, expected->layers[1].keep_indices);
}

}  // namespace
}  // namespace keepset::engine
