#include <memory>
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
using ::testing::HasSubstr;

float Golden(int64_t i, int64_t s) { return static_cast<float>((37 * i + 11 * s) % 17 - 8) / 8.0f; }

// The tiny golden case of methods.md 4.1.
fakes::SyntheticPrompt GoldenPrompt(kernels::DType dtype) {
  fakes::PromptShape shape;
  shape.num_layers = 1;
  shape.num_qo_heads = 4;
  shape.num_kv_heads = 2;
  shape.head_dim = 2;
  shape.seq_len = 8;
  shape.num_rows = 2;
  shape.dtype = dtype;
  fakes::SyntheticPrompt prompt(shape);
  for (int64_t c = 0; c < 2; ++c) {
    for (int64_t h = 0; h < 4; ++h) {
      for (int64_t i = 0; i < 2; ++i) prompt.set_q(0, h, i, c, Golden(50 * h + 7 * i + c, 2));
    }
    for (int64_t g = 0; g < 2; ++g) {
      for (int64_t t = 0; t < 8; ++t) prompt.set_k(0, g, t, c, Golden(100 * g + 3 * t + c, 1));
    }
  }
  return prompt;
}

OperationSpec SnapKvSpec(const fakes::SyntheticPrompt& prompt, int64_t budget) {
  OperationSpec spec = prompt.spec();
  spec.policy = "snapkv";
  spec.budget.kind = Budget::Kind::kTokens;
  spec.budget.tokens = budget;
  return spec;
}

OperationResult RunSnapKv(const fakes::SyntheticPrompt& prompt, const OperationSpec& spec) {
  absl::StatusOr<OperationResult> result = Bench().Run(spec, prompt);
  EXPECT_TRUE(result.ok()) << result.status();
  return result.ok() ? *std::move(result) : OperationResult{};
}

TEST(SnapKvPolicy, ReproducesTheTinyGoldenSets) {
  for (const kernels::DType dtype : {kernels::DType::kF32, kernels::DType::kBF16}) {
    const fakes::SyntheticPrompt prompt = GoldenPrompt(dtype);
    OperationSpec spec = SnapKvSpec(prompt, 5);
    spec.parameters["kernel_size"] = "3";
    const OperationResult result = RunSnapKv(prompt, spec);
    EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(1, 2, 4, 6, 7));
    EXPECT_THAT(result.layers[0].keep_indices[1], ElementsAre(1, 2, 4, 6, 7));
  }
}

TEST(SnapKvPolicy, RanksTheTinyGoldenCaseInOrder) {
  const fakes::SyntheticPrompt prompt = GoldenPrompt(kernels::DType::kF32);
  OperationSpec spec = SnapKvSpec(prompt, 3);
  spec.parameters["kernel_size"] = "3";
  const OperationResult first = RunSnapKv(prompt, spec);
  EXPECT_THAT(first.layers[0].keep_indices[0], ElementsAre(2, 6, 7));
  EXPECT_THAT(first.layers[0].keep_indices[1], ElementsAre(4, 6, 7));
}

TEST(SnapKvPolicy, ReproducesTheTinyGoldenScores) {
  const fakes::SyntheticPrompt prompt = GoldenPrompt(kernels::DType::kF32);
  Bench bench;
  PolicyParameters parameters("snapkv", {{"kernel_size", "3"}});
  auto policy = bench.policies().New("snapkv", parameters);
  ASSERT_TRUE(policy.ok());
  auto op_context = bench.backend().NewContext();
  const OperationSpec spec = SnapKvSpec(prompt, 5);
  const std::vector<int64_t> rows = {6, 7};
  PolicyContext context{spec, bench.backend(), **op_context, Scope::kKvHead, 5, rows, std::nullopt};
  ASSERT_TRUE((*policy)->Begin(context).ok());
  auto scores = bench.backend().NewBuffer(2, 8);
  const ObservedLayer layer = {0, prompt.observation(0)};
  kernels::ScoreBuffer* const all[] = {scores->get()};
  ASSERT_TRUE((*policy)->Score(context, absl::MakeConstSpan(&layer, 1), all).ok());
  std::vector<float> host(16);
  ASSERT_TRUE(bench.backend().CopyToHost(**op_context, **scores, absl::MakeSpan(host)).ok());
  const float expected[] = {0.094484f, 0.136301f, 0.144231f, 0.133509f, 0.140316f, 0.090039f,
                            0.084709f, 0.123395f, 0.129419f, 0.122613f, 0.129768f, 0.084380f};
  for (int t = 0; t < 6; ++t) {
    EXPECT_NEAR(host[t], expected[t], 1e-6);
    EXPECT_NEAR(host[8 + t], expected[6 + t], 1e-6);
  }
}

TEST(SnapKvPolicy, SelectsWhatPlainLoopsSelect) {
  fakes::PromptShape shape;
  for (const fakes::KvLayout layout :
       {fakes::KvLayout::kHnd, fakes::KvLayout::kNhd, fakes::KvLayout::kPaged}) {
    shape.layout = layout;
    shape.dtype = layout == fakes::KvLayout::kHnd ? kernels::DType::kF32 : kernels::DType::kBF16;
    const fakes::SyntheticPrompt prompt(shape);
    const OperationResult result = RunSnapKv(prompt, SnapKvSpec(prompt, 30));
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
      const auto expected = oracle::SnapKvScores(prompt, layer, /*kernel_size=*/5);
      for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
        EXPECT_EQ(
            oracle::CheckKeepSet(result.layers[layer].keep_indices[head], expected[head], 30, -1.0),
            "");
      }
    }
  }
}

TEST(SnapKvPolicy, BudgetBelowTheWindowKeepsTheMostRecent) {
  const fakes::SyntheticPrompt prompt{fakes::PromptShape{}};
  const OperationResult result = RunSnapKv(prompt, SnapKvSpec(prompt, 3));
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(93, 94, 95));
}

TEST(SnapKvPolicy, WindowOfTheWholePromptKeepsTheMostRecent) {
  fakes::PromptShape shape;
  shape.seq_len = 8;
  shape.num_rows = 8;
  const fakes::SyntheticPrompt prompt(shape);
  const OperationResult result = RunSnapKv(prompt, SnapKvSpec(prompt, 5));
  EXPECT_THAT(result.layers[0].keep_indices[0], ElementsAre(3, 4, 5, 6, 7));
}

TEST(SnapKvPolicy, ObservedRowsElsewhereAreKept) {
  const fakes::SyntheticPrompt prompt{fakes::PromptShape{}};
  OperationSpec spec = SnapKvSpec(prompt, 8);
  spec.row_positions = {20, 21, 22, 40, 41, 42, 43, 60};
  const OperationResult result = RunSnapKv(prompt, spec);
  EXPECT_THAT(result.layers[1].keep_indices[1], ElementsAre(20, 21, 22, 40, 41, 42, 43, 60));
}

TEST(SnapKvPolicy, LayerScopeSharesOneSetPerLayer) {
  const fakes::SyntheticPrompt prompt{fakes::PromptShape{}};
  OperationSpec spec = SnapKvSpec(prompt, 30);
  spec.scope = Scope::kLayerEqual;
  const OperationResult result = RunSnapKv(prompt, spec);
  EXPECT_EQ(result.layers[0].keep_indices.size(), 1u);
  EXPECT_EQ(result.layers[0].keep_indices[0].size(), 30u);
}

TEST(SnapKvPolicy, EvenKernelIsRefused) {
  const fakes::SyntheticPrompt prompt{fakes::PromptShape{}};
  OperationSpec spec = SnapKvSpec(prompt, 30);
  spec.parameters["kernel_size"] = "4";
  const absl::Status status = Bench().Begin(spec).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("parameter kernel_size=4, want an odd integer"));
}

TEST(SnapKvPolicy, TileGivesTheSetsOfItsQueries) {
  const fakes::SyntheticPrompt prompt{fakes::PromptShape{}};
  const fakes::PromptShape& shape = prompt.shape();
  Bench bench;
  const OperationSpec spec = SnapKvSpec(prompt, 30);
  auto operation = bench.Begin(spec);
  ASSERT_TRUE(operation.ok());
  for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
    std::vector<float> values;
    for (const auto& head : oracle::Attention(prompt, layer, oracle::LastRows(prompt))) {
      for (const auto& row : head) values.insert(values.end(), row.begin(), row.end());
    }
    LayerObservation observation;
    kernels::TileView& tile = observation.attn_tile;
    tile.data = reinterpret_cast<const std::byte*>(values.data());
    tile.size_bytes = static_cast<int64_t>(values.size() * sizeof(float));
    tile.num_qo_heads = shape.num_qo_heads;
    tile.num_rows = shape.num_rows;
    tile.seq_len = shape.seq_len;
    tile.head_stride = shape.num_rows * shape.seq_len;
    tile.row_stride = shape.seq_len;
    ASSERT_TRUE((*operation)->Observe(layer, observation).ok());
  }
  const auto result = (*operation)->Finish();
  ASSERT_TRUE(result.ok());
  const auto expected = oracle::SnapKvScores(prompt, 2, /*kernel_size=*/5);
  EXPECT_EQ(oracle::CheckKeepSet((*result)->layers[2].keep_indices[1], expected[1], 30, -1.0), "");
}

}  // namespace
}  // namespace keepset::engine
