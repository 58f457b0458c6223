#include "engine/shadow.h"

#include <algorithm>
#include <iterator>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/operation.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/run_operation.h"
#include "tests/fakes/gated_backend.h"
#include "tests/fakes/synthetic_prompt.h"

namespace keepset::engine {
namespace {

using ::testing::HasSubstr;

LayerResult Layer(std::vector<std::vector<int32_t>> sets) {
  LayerResult layer;
  layer.keep_indices = std::move(sets);
  return layer;
}

TEST(KeptOverlap, IsTheShareOfWhatWasDecided) {
  EXPECT_DOUBLE_EQ(KeptOverlap({Layer({{0, 2, 4, 6}})}, {Layer({{2, 3, 4, 5}})}), 0.5);
  EXPECT_DOUBLE_EQ(KeptOverlap({Layer({{1, 2}})}, {Layer({{0, 1, 2, 3, 4}})}), 1.0);
  EXPECT_DOUBLE_EQ(KeptOverlap({Layer({{1, 2}})}, {Layer({{3, 4}})}), 0.0);
}

TEST(KeptOverlap, IsTheMeanOverLayersAndCountsHeadsTogether) {
  EXPECT_DOUBLE_EQ(KeptOverlap({Layer({{1}}), Layer({{1, 2}})}, {Layer({{1}}), Layer({{1, 3}})}),
                   0.75);
  // 3 of 4 kept positions over both heads, not the mean of 1 and 2/3.
  EXPECT_DOUBLE_EQ(KeptOverlap({Layer({{1}, {1, 2, 3}})}, {Layer({{1}, {1, 2, 4}})}), 0.75);
}

// A prompt, the table that decides and one that weighs heads the other way round.
class Shadow : public ::testing::Test {
 protected:
  Shadow() {
    fakes::TableSample one;
    fakes::TableSample other;
    for (int i = 0; i < 12; ++i) {
      one.head_weights.push_back(i % 2 == 0 ? 0.8f : 1.4f);
      other.head_weights.push_back(i % 4 < 2 ? 1.5f : 0.8f);
    }
    one.gate_thresholds = {0.9f, 0.9f, 0.9f};
    other.gate_thresholds = {0.8f, 1.0f, 0.9f};
    spec_ = prompt_.spec();
    spec_.policy = "compilerkv";
    spec_.budget.kind = Budget::Kind::kTokens;
    spec_.budget.tokens = 20;
    spec_.ppl = 10.0;
    spec_.table = fakes::MakeTable(prompt_.model(), one);
    other_ = fakes::MakeTable(prompt_.model(), other);
  }

  std::unique_ptr<Operation> RunToFinish(const OperationSpec& spec) {
    return RunInGroups(bench_, spec, 1);
  }
  // Layers come `group` at a time.
  std::unique_ptr<Operation> RunInGroups(Bench& bench, const OperationSpec& spec, int64_t group) {
    absl::StatusOr<std::unique_ptr<Operation>> operation = bench.Begin(spec);
    EXPECT_TRUE(operation.ok()) << operation.status();
    std::vector<ObservedLayer> layers;
    for (int64_t layer = 0; layer < spec.model.num_layers; ++layer) {
      layers.push_back({layer, prompt_.observation(layer)});
      if (std::ssize(layers) < group && layer + 1 < spec.model.num_layers) continue;
      EXPECT_TRUE((*operation)->ObserveLayers(layers).ok());
      layers.clear();
    }
    EXPECT_TRUE((*operation)->Finish().ok());
    return *std::move(operation);
  }
  static std::vector<std::vector<std::vector<int32_t>>> SetsOf(const OperationResult& result) {
    std::vector<std::vector<std::vector<int32_t>>> sets;
    for (const LayerResult& layer : result.layers) sets.push_back(layer.keep_indices);
    return sets;
  }

  fakes::SyntheticPrompt prompt_{fakes::PromptShape{}};
  OperationSpec spec_;
  std::shared_ptr<const tables::DecisionTable> other_;
  Bench bench_;
};

// Plain sets of two separate operations are the reference.
TEST_F(Shadow, ReportsWhatAnOperationOfTheOtherTableDecides) {
  for (const std::string alpha_scope : {"global", "layer", "head"}) {
    for (const Scope scope :
         {Scope::kLayerElastic, Scope::kLayerEqual, Scope::kSequence, Scope::kKvHead}) {
      OperationSpec spec = spec_;
      spec.scope = scope;
      spec.parameters["alpha_scope"] = alpha_scope;
      const auto decided = bench_.Run(spec, prompt_);
      OperationSpec other_spec = spec;
      other_spec.table = other_;
      const auto other = bench_.Run(other_spec, prompt_);
      ASSERT_TRUE(decided.ok() && other.ok());
      double expected = 0;
      for (size_t l = 0; l < decided->layers.size(); ++l) {
        double kept = 0;
        double common = 0;
        for (size_t s = 0; s < decided->layers[l].keep_indices.size(); ++s) {
          const auto& set = other->layers[l].keep_indices[s];
          const std::set<int32_t> would_keep(set.begin(), set.end());
          for (int32_t position : decided->layers[l].keep_indices[s]) {
            kept += 1;
            common += would_keep.contains(position) ? 1 : 0;
          }
        }
        expected += common / kept / static_cast<double>(decided->layers.size());
      }

      spec.shadow_table = other_;
      const std::unique_ptr<Operation> operation = RunToFinish(spec);
      EXPECT_EQ(SetsOf(**operation->Finish()), SetsOf(*decided));
      auto shadow = operation->TakeShadow();
      ASSERT_TRUE(shadow.ok()) << shadow.status();
      ASSERT_NE(*shadow, nullptr);
      const auto report = (*shadow)->Finish();
      ASSERT_TRUE(report.ok()) << report.status();
      EXPECT_NEAR(report->kept_overlap, expected, 1e-12) << alpha_scope << ScopeName(scope);
      EXPECT_EQ(report->decided_bytes, decided->bytes_after);
      EXPECT_EQ(report->would_be_bytes, other->bytes_after);
      EXPECT_EQ(report->table, other_->identity());
    }
  }
}

// Of five layers, one by one and in groups: the decision and the report are the same to the bit.
TEST_F(Shadow, OfLayersTogetherIsThatOfOneByOne) {
  prompt_ = fakes::SyntheticPrompt({.num_layers = 5});
  spec_.model = prompt_.spec().model;
  for (const std::string policy : {"compilerkv", "observation_heads"}) {
    for (const std::string alpha_scope : {"global", "layer", "head"}) {
      OperationSpec spec = spec_;
      spec.policy = policy;
      if (policy == "compilerkv") {
        spec.parameters["alpha_scope"] = alpha_scope;
        fakes::TableSample other;
        for (int i = 0; i < 20; ++i) other.head_weights.push_back(i % 4 < 2 ? 1.5f : 0.8f);
        spec.table = fakes::MakeTableFor(policy, prompt_.model());
        spec.shadow_table = fakes::MakeTable(prompt_.model(), other);
      } else {
        spec.table = spec.shadow_table = fakes::MakeTableFor(policy, prompt_.model());
      }
      const std::unique_ptr<Operation> alone = RunToFinish(spec);
      auto shadow = alone->TakeShadow();
      ASSERT_TRUE(shadow.ok()) << shadow.status();
      const ShadowReport want = *(*shadow)->Finish();
      for (const int64_t group : {2, 3, 5}) {
        fakes::Gate gate;
        Bench bench(NewCpuBackendOfManyLayers(gate, 8));
        const std::unique_ptr<Operation> together = RunInGroups(bench, spec, group);
        if (policy == "compilerkv") {
          // The observation is worked out once for both tables.
          EXPECT_EQ(std::ssize(gate.layers()), (5 + group - 1) / group);
        }
        EXPECT_EQ(SetsOf(**together->Finish()), SetsOf(**alone->Finish()));
        shadow = together->TakeShadow();
        ASSERT_TRUE(shadow.ok()) << shadow.status();
        const absl::StatusOr<ShadowReport> report = (*shadow)->Finish();
        ASSERT_TRUE(report.ok()) << report.status();
        EXPECT_EQ(report->kept_overlap, want.kept_overlap) << policy << alpha_scope << group;
        EXPECT_EQ(report->would_be_bytes, want.would_be_bytes);
      }
    }
  }
}

TEST_F(Shadow, OfTheSameTableOverlapsWholly) {
  spec_.shadow_table = spec_.table;
  const auto report = (*RunToFinish(spec_)->TakeShadow())->Finish();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->kept_overlap, 1.0);
  EXPECT_EQ(report->would_be_bytes, report->decided_bytes);
}

TEST_F(Shadow, FinishesAfterItsOperationIsGone) {
  spec_.shadow_table = other_;
  std::unique_ptr<Operation> operation = RunToFinish(spec_);
  std::unique_ptr<ShadowDecision> shadow = *operation->TakeShadow();
  operation.reset();
  EXPECT_TRUE(shadow->Finish().ok());
}

TEST_F(Shadow, IsNothingWithoutATable) { EXPECT_EQ(*RunToFinish(spec_)->TakeShadow(), nullptr); }

TEST_F(Shadow, IsNothingWhereTheOperationDecidedNothing) {
  spec_.shadow_table = other_;
  spec_.budget.tokens = prompt_.shape().seq_len;
  EXPECT_EQ(*RunToFinish(spec_)->TakeShadow(), nullptr);
  spec_.budget.tokens = 20;
  spec_.deadline = bench_.clock().Monotonic();
  EXPECT_EQ(*RunToFinish(spec_)->TakeShadow(), nullptr);
}

TEST_F(Shadow, ThatDoesNotFitFailsAloneAndSaysWhy) {
  tables::ModelFingerprint model = prompt_.model();
  model.num_layers += 1;
  spec_.shadow_table = fakes::MakeTable(model, {});
  const std::unique_ptr<Operation> operation = RunToFinish(spec_);
  EXPECT_EQ((*operation->Finish())->outcome, Outcome::kCompressed);
  const absl::Status why = operation->TakeShadow().status();
  EXPECT_EQ(why.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(why.message()), HasSubstr("num_layers"));
}

TEST_F(Shadow, OfABudgetItWasNotCompiledForFailsAlone) {
  fakes::TableSample sample;
  sample.budgets = {64};
  spec_.shadow_table = fakes::MakeTable(prompt_.model(), sample);
  const std::unique_ptr<Operation> operation = RunToFinish(spec_);
  EXPECT_EQ((*operation->Finish())->outcome, Outcome::kCompressed);
  EXPECT_EQ(operation->TakeShadow().status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(Shadow, OfAPolicyWithoutATableIsRefused) {
  spec_.policy = "snapkv";
  spec_.table = nullptr;
  spec_.shadow_table = other_;
  EXPECT_EQ(RunToFinish(spec_)->TakeShadow().status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace keepset::engine
