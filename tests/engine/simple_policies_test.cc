#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/oracle.h"
#include "tests/engine/run_operation.h"

namespace keepset::engine {
namespace {

using ::testing::ElementsAre;

OperationResult Decide(const OperationSpec& spec) {
  absl::StatusOr<OperationResult> result = Bench().Run(spec);
  EXPECT_TRUE(result.ok()) << result.status();
  return result.ok() ? *std::move(result) : OperationResult{};
}

OperationResult Decide(const OperationSpec& spec, const fakes::SyntheticPrompt& prompt) {
  absl::StatusOr<OperationResult> result = Bench().Run(spec, prompt);
  EXPECT_TRUE(result.ok()) << result.status();
  return result.ok() ? *std::move(result) : OperationResult{};
}

OperationSpec PromptSpec(const fakes::SyntheticPrompt& prompt, const std::string& policy,
                         int64_t budget) {
  OperationSpec spec = prompt.spec();
  spec.policy = policy;
  spec.budget.kind = Budget::Kind::kTokens;
  spec.budget.tokens = budget;
  return spec;
}

TEST(StreamingLlmPolicy, KeepsSinksAndTheMostRecent) {
  const OperationResult result = Decide(TensorlessSpec("streaming_llm", 2, 20, 7));
  EXPECT_THAT(result.layers[1].keep_indices[0], ElementsAre(0, 1, 2, 3, 17, 18, 19));
}

TEST(StreamingLlmPolicy, BudgetOfAtMostTheSinksKeepsTheFirst) {
  const OperationResult result = Decide(TensorlessSpec("streaming_llm", 1, 20, 3));
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(0, 1, 2));
}

TEST(StreamingLlmPolicy, SinkCountIsAParameter) {
  OperationSpec spec = TensorlessSpec("streaming_llm", 1, 20, 3);
  spec.parameters["n_sink"] = "0";
  EXPECT_THAT(Decide(spec).layers[0].keep_indices[0], ElementsAre(17, 18, 19));
}

TEST(StreamingLlmPolicy, MoreSinksThanPromptKeepTheFirst) {
  OperationSpec spec = TensorlessSpec("streaming_llm", 1, 5, 3);
  spec.parameters["n_sink"] = "100";
  EXPECT_THAT(Decide(spec).layers[0].keep_indices[0], ElementsAre(0, 1, 2));
}

TEST(TovaPolicy, RanksByTheLastRowOfAllHeads) {
  const fakes::SyntheticPrompt prompt{fakes::PromptShape{}};
  const fakes::PromptShape& shape = prompt.shape();
  const OperationResult result = Decide(PromptSpec(prompt, "tova", 20), prompt);
  for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
    const oracle::Tile tile = oracle::Attention(prompt, layer, oracle::LastRows(prompt));
    std::vector<double> scores(shape.seq_len, 0.0);
    for (const auto& head : tile) {
      for (int64_t t = 0; t < shape.seq_len; ++t) scores[t] += head.back()[t] / 4.0;
    }
    scores.back() = 2.0;
    EXPECT_EQ(oracle::CheckKeepSet(result.layers[layer].keep_indices[0], scores, 20, -1.0), "");
  }
}

TEST(TovaPolicy, LastPositionStaysWithABudgetOfOne) {
  const fakes::SyntheticPrompt prompt{fakes::PromptShape{}};
  OperationSpec spec = PromptSpec(prompt, "tova", 1);
  spec.row_positions = {1, 2, 3, 4, 5, 6, 7, 8};
  EXPECT_THAT(Decide(spec, prompt).layers[0].keep_indices[0], ElementsAre(95));
}

TEST(KnormPolicy, KeepsTheKeysOfSmallestNormPerHead) {
  const fakes::SyntheticPrompt prompt{fakes::PromptShape{}};
  const fakes::PromptShape& shape = prompt.shape();
  const OperationResult result = Decide(PromptSpec(prompt, "knorm", 20), prompt);
  for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
    std::vector<double> scores(shape.seq_len, 0.0);
    for (int64_t t = 0; t < shape.seq_len; ++t) {
      for (int64_t c = 0; c < shape.head_dim; ++c) {
        scores[t] += prompt.k(1, head, t, c) * prompt.k(1, head, t, c);
      }
      scores[t] = -std::sqrt(scores[t]);
    }
    EXPECT_EQ(oracle::CheckKeepSet(result.layers[1].keep_indices[head], scores, 20, -1e9), "");
  }
}

TEST(RandomPolicy, DrawsTheSameSetOnEveryPlatform) {
  const OperationResult result = Decide(TensorlessSpec("random", 2, 32, 4));
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(16, 18, 19, 23));
  EXPECT_THAT(result.layers[1].keep_indices[0], ElementsAre(25, 26, 30, 31));
}

TEST(RandomPolicy, AnotherSeedDrawsAnotherSet) {
  OperationSpec spec = TensorlessSpec("random", 1, 256, 32);
  const auto first = Decide(spec).layers[0].keep_indices;
  spec.parameters["seed"] = "1";
  EXPECT_NE(Decide(spec).layers[0].keep_indices, first);
}

TEST(RandomPolicy, DrawsEveryPositionAboutEquallyOften) {
  std::vector<int> counts(64, 0);
  for (int seed = 0; seed < 400; ++seed) {
    OperationSpec spec = TensorlessSpec("random", 1, 64, 16);
    spec.parameters["seed"] = std::to_string(seed);
    const OperationResult result = Decide(spec);
    for (const int32_t t : result.layers[0].keep_indices[0]) ++counts[t];
  }
  // 100 expected with a standard deviation below 9; six of them on either side.
  EXPECT_GT(*std::min_element(counts.begin(), counts.end()), 46);
  EXPECT_LT(*std::max_element(counts.begin(), counts.end()), 154);
}

TEST(FullPolicy, KeepsEverythingForNoReason) {
  OperationSpec spec = TensorlessSpec("full", 2, 5, 1);
  spec.budget = {};
  const OperationResult result = Decide(spec);
  EXPECT_EQ(result.outcome, Outcome::kKeptFull);
  EXPECT_EQ(result.reason, Reason::kNone);
  EXPECT_THAT(result.layers[1].keep_indices[0], ElementsAre(0, 1, 2, 3, 4));
  EXPECT_EQ(result.bytes_after, result.bytes_before);
}

}  // namespace
}  // namespace keepset::engine
