#include <cmath>
#include <cstring>
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
using ::testing::IsEmpty;

// Golden vector 1 of methods.md 1.6: T = 3, two heads, two rows.
class GoldenVectorOne {
 public:
  GoldenVectorOne() {
    spec_.model.architecture = "GoldenForCausalLM";
    spec_.model.num_layers = 1;
    spec_.model.num_qo_heads = 2;
    spec_.model.num_kv_heads = 2;
    spec_.model.head_dim = 1;
    spec_.seq_len = 3;
    spec_.num_rows = 2;
    spec_.policy = "compilerkv";
    spec_.budget.kind = Budget::Kind::kTokens;
    spec_.budget.tokens = 3;
    fakes::TableSample sample;
    sample.head_weights = {1.0f, 1.5f};
    spec_.table = fakes::MakeTable(spec_.model, sample);
  }

  OperationSpec& spec() { return spec_; }

  LayerObservation observation() const {
    LayerObservation observation;
    kernels::TileView& tile = observation.attn_tile;
    tile.data = reinterpret_cast<const std::byte*>(kTile);
    tile.size_bytes = sizeof(kTile);
    tile.num_qo_heads = 2;
    tile.num_rows = 2;
    tile.seq_len = 3;
    tile.head_stride = 6;
    tile.row_stride = 3;
    kernels::KvView& v = observation.v;
    v.data = reinterpret_cast<const std::byte*>(kValues);
    v.size_bytes = sizeof(kValues);
    v.num_kv_heads = 2;
    v.seq_len = 3;
    v.head_dim = 1;
    v.head_stride = 3;
    v.token_stride = 1;
    return observation;
  }

  absl::StatusOr<OperationResult> Run() const {
    Bench bench;
    auto operation = bench.Begin(spec_);
    if (!operation.ok()) return operation.status();
    if (absl::Status status = (*operation)->Observe(0, observation()); !status.ok()) return status;
    const absl::StatusOr<const OperationResult*> result = (*operation)->Finish();
    if (!result.ok()) return result.status();
    return **result;
  }

 private:
  static constexpr float kTile[] = {.5f, .5f, 0, 0, .5f, .5f, .5f, .5f, 0, 0, .5f, .5f};
  static constexpr float kValues[] = {1, 1, 1, 1, 2, 3};
  OperationSpec spec_;
};

TEST(CompilerKvPolicy, ReproducesTheScoresOfGoldenVectorOneBitForBit) {
  GoldenVectorOne golden;
  Bench bench;
  PolicyParameters parameters("compilerkv", {});
  auto policy = bench.policies().New("compilerkv", parameters);
  ASSERT_TRUE(policy.ok());
  auto op_context = bench.backend().NewContext();
  ASSERT_TRUE(op_context.ok());
  const std::vector<int64_t> rows = {1, 2};
  PolicyContext context{golden.spec(), bench.backend(), **op_context, Scope::kLayerElastic, 3,
                        rows,          std::nullopt};
  ASSERT_TRUE((*policy)->Begin(context).ok());
  auto scores = bench.backend().NewBuffer(1, 3);
  ASSERT_TRUE((*policy)->Score(context, 0, golden.observation(), **scores).ok());
  kernels::ScoreBuffer* const all[] = {scores->get()};
  ASSERT_TRUE((*policy)->FinishScores(context, all).ok());
  std::vector<float> host(3);
  ASSERT_TRUE(bench.backend().CopyToHost(**op_context, **scores, absl::MakeSpan(host)).ok());
  EXPECT_THAT(host, ElementsAre(0.75f, 2.25f, 1.6875f));
}

TEST(CompilerKvPolicy, GatesGoldenVectorOneBelowTheBudgetWhenAsked) {
  GoldenVectorOne golden;
  golden.spec().parameters["gate_below_budget"] = "1";
  const absl::StatusOr<OperationResult> result = golden.Run();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->outcome, Outcome::kCompressed);
  EXPECT_THAT(result->layers[0].keep_indices[0], ElementsAre(1, 2));
  EXPECT_EQ(result->layers[0].candidates[0], 2);
}

TEST(CompilerKvPolicy, KeepsGoldenVectorOneWholeByDefault) {
  const absl::StatusOr<OperationResult> result = GoldenVectorOne().Run();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->outcome, Outcome::kKeptFull);
  EXPECT_EQ(result->reason, Reason::kBelowBudget);
  EXPECT_THAT(result->layers[0].keep_indices[0], ElementsAre(0, 1, 2));
}

TEST(CompilerKvPolicy, EverythingPassingTheGateIsNoSaving) {
  GoldenVectorOne golden;
  golden.spec().parameters["gate_below_budget"] = "1";
  golden.spec().protect_sink = 1;
  const absl::StatusOr<OperationResult> result = golden.Run();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->outcome, Outcome::kKeptFull);
  EXPECT_EQ(result->reason, Reason::kNoSaving);
  EXPECT_EQ(result->bytes_after, result->bytes_before);
}

TEST(CompilerKvPolicy, TableEntropyBinsUseNats) {
  GoldenVectorOne golden;
  golden.spec().parameters["gate_below_budget"] = "1";
  const absl::StatusOr<OperationResult> result = golden.Run();
  ASSERT_TRUE(result.ok());
  // p = {1/4, 1/2, 1/4}.
  EXPECT_NEAR(*result->entropy, 1.5 * std::log(2.0), 1e-6);
  EXPECT_EQ(*result->entropy_bin, 0);
}

struct Case {
  std::string name;
  fakes::PromptShape shape;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  fakes::PromptShape shape;
  cases.push_back({"Gqa", shape});
  shape.dtype = kernels::DType::kBF16;
  shape.layout = fakes::KvLayout::kPaged;
  shape.seq_len = 101;
  cases.push_back({"PagedBf16", shape});
  shape.dtype = kernels::DType::kF16;
  shape.layout = fakes::KvLayout::kNhd;
  cases.push_back({"NhdF16", shape});
  shape = {};
  shape.num_qo_heads = 3;
  shape.num_kv_heads = 3;
  shape.head_dim = 5;
  cases.push_back({"MhaOddHeadDim", shape});
  shape = {};
  shape.num_qo_heads = 8;
  shape.num_kv_heads = 1;
  shape.num_rows = 80;
  shape.seq_len = 130;
  cases.push_back({"MqaLongWindow", shape});
  return cases;
}

class CompilerKvOracle : public ::testing::TestWithParam<Case> {};

TEST_P(CompilerKvOracle, SelectsWhatPlainLoopsSelect) {
  const fakes::SyntheticPrompt prompt(GetParam().shape);
  fakes::TableSample sample;
  const int64_t heads = prompt.shape().num_layers * prompt.shape().num_qo_heads;
  for (int64_t i = 0; i < heads; ++i) {
    sample.head_weights.push_back(0.8f + 0.05f * static_cast<float>(i * 7 % 15));
  }
  sample.gate_thresholds = {0.8f, 0.9f, 1.0f};
  OperationSpec spec = prompt.spec();
  spec.policy = "compilerkv";
  spec.table = fakes::MakeTable(prompt.model(), sample);
  spec.budget.kind = Budget::Kind::kTokens;
  const oracle::CompilerKv expected = oracle::CompilerKvScores(prompt, sample.head_weights, 64);
  for (const int64_t budget : {1, 10, 90}) {
    spec.budget.tokens = budget;
    const absl::StatusOr<OperationResult> result = Bench().Run(spec, prompt);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_NEAR(*result->entropy, expected.entropy, 1e-4);
    for (int64_t layer = 0; layer < prompt.shape().num_layers; ++layer) {
      EXPECT_EQ(oracle::CheckKeepSet(result->layers[layer].keep_indices[0], expected.scores[layer],
                                     budget, sample.gate_thresholds[layer]),
                "")
          << "layer " << layer << ", budget " << budget;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, CompilerKvOracle, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

// One prompt with a table whose head weights and gates differ per head and layer.
struct Sample {
  fakes::SyntheticPrompt prompt{fakes::PromptShape{}};
  fakes::TableSample table;
  OperationSpec spec;

  Sample() {
    for (int i = 0; i < 12; ++i) table.head_weights.push_back(i % 2 == 0 ? 0.8f : 1.4f);
    Reset();
  }
  void Reset() {
    spec = prompt.spec();
    spec.policy = "compilerkv";
    spec.budget.kind = Budget::Kind::kTokens;
    spec.budget.tokens = 20;
    spec.table = fakes::MakeTable(prompt.model(), table);
  }
  OperationResult Run() {
    absl::StatusOr<OperationResult> result = Bench().Run(spec, prompt);
    EXPECT_TRUE(result.ok()) << result.status();
    return result.ok() ? *std::move(result) : OperationResult{};
  }
  absl::Status BeginStatus() { return Bench().Begin(spec).status(); }
};

std::vector<std::vector<int32_t>> Sets(const OperationResult& result) {
  std::vector<std::vector<int32_t>> sets;
  for (const LayerResult& layer : result.layers) {
    sets.insert(sets.end(), layer.keep_indices.begin(), layer.keep_indices.end());
  }
  return sets;
}

TEST(CompilerKvPolicy, DoublingValuesChangesNothing) {
  Sample sample;
  const auto before = Sets(sample.Run());
  const fakes::PromptShape& shape = sample.prompt.shape();
  for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
      for (int64_t t = 0; t < shape.seq_len; ++t) {
        for (int64_t c = 0; c < shape.head_dim; ++c) {
          sample.prompt.set_v(layer, head, t, c,
                              static_cast<float>(2.0 * sample.prompt.v(layer, head, t, c)));
        }
      }
    }
  }
  EXPECT_EQ(Sets(sample.Run()), before);
}

TEST(CompilerKvPolicy, AConstantAddedToTheLogitsChangesNothing) {
  Sample sample;
  const fakes::PromptShape& shape = sample.prompt.shape();
  const auto set_key_channel = [&](float value) {
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
      for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
        for (int64_t t = 0; t < shape.seq_len; ++t) {
          sample.prompt.set_k(layer, head, t, 0, value);
        }
      }
    }
  };
  set_key_channel(0.0f);
  const auto before = Sets(sample.Run());
  // The same number in channel 0 of every key adds q[0] times it to every logit of a row.
  set_key_channel(1.5f);
  EXPECT_EQ(Sets(sample.Run()), before);
}

TEST(CompilerKvPolicy, PermutingKvHeadsWithTheirTableRowsChangesNothing) {
  Sample sample;
  const auto before = Sets(sample.Run());
  Sample permuted;
  const fakes::PromptShape& shape = permuted.prompt.shape();
  const int64_t group = shape.num_qo_heads / shape.num_kv_heads;
  const auto mirror = [&](int64_t kv_head) { return shape.num_kv_heads - 1 - kv_head; };
  for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
    for (int64_t head = 0; head < shape.num_qo_heads; ++head) {
      const int64_t from = mirror(head / group) * group + head % group;
      permuted.table.head_weights[layer * shape.num_qo_heads + head] =
          sample.table.head_weights[layer * shape.num_qo_heads + from];
      for (int64_t row = 0; row < shape.num_rows; ++row) {
        for (int64_t c = 0; c < shape.head_dim; ++c) {
          permuted.prompt.set_q(layer, head, row, c,
                                static_cast<float>(sample.prompt.q(layer, from, row, c)));
        }
      }
    }
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
      for (int64_t t = 0; t < shape.seq_len; ++t) {
        for (int64_t c = 0; c < shape.head_dim; ++c) {
          permuted.prompt.set_k(layer, head, t, c,
                                static_cast<float>(sample.prompt.k(layer, mirror(head), t, c)));
          permuted.prompt.set_v(layer, head, t, c,
                                static_cast<float>(sample.prompt.v(layer, mirror(head), t, c)));
        }
      }
    }
  }
  permuted.Reset();
  EXPECT_EQ(Sets(permuted.Run()), before);
}

TEST(CompilerKvPolicy, MissingPplIsRefusedWhenTheTableAsksForIt) {
  Sample sample;
  sample.table.ppl_edges = {5.0f, 10.0f, 30.0f};
  sample.Reset();
  EXPECT_EQ(sample.BeginStatus().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(sample.BeginStatus().message(),
              HasSubstr("missing ppl, want ppl or window_logprobs, or parameter "
                        "missing_ppl=median"));
}

TEST(CompilerKvPolicy, MissingPplIsTheMedianEdgeWhenAskedAndReported) {
  Sample sample;
  sample.table.ppl_edges = {5.0f, 10.0f, 30.0f};
  sample.Reset();
  sample.spec.parameters["missing_ppl"] = "median";
  const OperationResult result = sample.Run();
  EXPECT_EQ(*result.ppl, 10.0);
  EXPECT_EQ(*result.ppl_bin, 2);
  EXPECT_THAT(result.defaulted_inputs, ElementsAre("ppl"));
}

TEST(CompilerKvPolicy, MedianOfTwoEdgesIsTheirMean) {
  Sample sample;
  sample.table.ppl_edges = {4.0f, 10.0f};
  sample.Reset();
  sample.spec.parameters["missing_ppl"] = "median";
  EXPECT_EQ(*sample.Run().ppl, 7.0);
}

TEST(CompilerKvPolicy, TableWithoutPplAxisNeedsNoPpl) {
  Sample sample;
  const OperationResult result = sample.Run();
  EXPECT_FALSE(result.ppl.has_value());
  EXPECT_FALSE(result.ppl_bin.has_value());
  EXPECT_THAT(result.defaulted_inputs, IsEmpty());
}

TEST(CompilerKvPolicy, PplComesFromLogProbabilities) {
  Sample sample;
  sample.table.ppl_edges = {5.0f, 10.0f};
  sample.Reset();
  sample.spec.window_logprobs = {-std::log(4.0f), -std::log(16.0f)};
  const OperationResult result = sample.Run();
  EXPECT_NEAR(*result.ppl, 8.0, 1e-5);
  EXPECT_EQ(*result.ppl_bin, 1);
}

TEST(CompilerKvPolicy, OnlyLogProbabilitiesOfTheWindowCount) {
  Sample sample;
  sample.table.ppl_edges = {5.0f, 10.0f};
  sample.Reset();
  sample.spec.parameters["window"] = "2";
  sample.spec.window_logprobs = {-50.0f, -std::log(4.0f), -std::log(16.0f)};
  EXPECT_NEAR(*sample.Run().ppl, 8.0, 1e-5);
}

TEST(CompilerKvPolicy, GivenPplWinsOverLogProbabilities) {
  Sample sample;
  sample.spec.ppl = 3.0;
  sample.spec.window_logprobs = {-1.0f};
  EXPECT_EQ(*sample.Run().ppl, 3.0);
}

TEST(CompilerKvPolicy, GateFollowsEntropyAndPplBins) {
  Sample sample;
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
  Sample sample;
  sample.spec.table = nullptr;
  EXPECT_EQ(sample.BeginStatus().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(sample.BeginStatus().message(),
              HasSubstr("policy compilerkv needs a table of kind compilerkv, none given"));
}

TEST(CompilerKvPolicy, TableOfAnotherModelDoesNotFit) {
  Sample sample;
  sample.spec.model.architecture = "OtherForCausalLM";
  EXPECT_EQ(sample.BeginStatus().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(sample.BeginStatus().message(), HasSubstr("architecture"));
}

TEST(CompilerKvPolicy, FingerprintMatchShapeIsReportedAsRelaxed) {
  Sample sample;
  const std::string compiled_for = sample.spec.model.architecture;
  sample.spec.model.architecture = "OtherForCausalLM";
  sample.spec.parameters["fingerprint_match"] = "shape";
  const OperationResult result = sample.Run();
  EXPECT_THAT(result.relaxed,
              ElementsAre("fingerprint_match: architecture is \"" + compiled_for +
                          "\" in the table and \"OtherForCausalLM\" in the request"));
}

TEST(CompilerKvPolicy, FewerLayersThanTheTableNeedInterpolation) {
  Sample sample;
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
  Sample sample;
  sample.table.budgets = {512};
  sample.Reset();
  sample.spec.budget.tokens = 512;
  const OperationResult result = sample.Run();
  EXPECT_EQ(result.reason, Reason::kBelowBudget);
  EXPECT_EQ(result.budget_tokens, 512);
}

TEST(CompilerKvPolicy, BudgetThatIsNotCompiledListsTheCompiledOnes) {
  Sample sample;
  sample.table.budgets = {16, 32};
  sample.Reset();
  EXPECT_EQ(sample.BeginStatus().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(sample.BeginStatus().message(), HasSubstr("16, 32"));
}

TEST(CompilerKvPolicy, NearestBudgetIsReportedAsRelaxed) {
  Sample sample;
  sample.table.budgets = {16, 32};
  sample.Reset();
  sample.spec.parameters["table_budget"] = "nearest";
  EXPECT_THAT(sample.Run().relaxed, ElementsAre(HasSubstr("20 served by 16")));
}

TEST(CompilerKvPolicy, TableBudgetIsTheDefaultBudget) {
  Sample sample;
  sample.table.budgets = {16};
  sample.Reset();
  sample.spec.budget = {};
  EXPECT_EQ(sample.Run().budget_tokens, 16);
}

TEST(CompilerKvPolicy, LayerAlphaAnswersWhileStreamingWithItsOwnEntropy) {
  Sample sample;
  sample.spec.parameters["alpha_scope"] = "layer";
  Bench bench;
  auto operation = bench.Begin(sample.spec);
  ASSERT_TRUE(operation.ok());
  ASSERT_TRUE((*operation)->Observe(0, sample.prompt.observation(0)).ok());
  const LayerResult* const early = (*operation)->EarlyResult(0);
  ASSERT_NE(early, nullptr);
  EXPECT_TRUE(early->entropy.has_value());
  const OperationResult result = sample.Run();
  EXPECT_EQ(result.layers[0].keep_indices, early->keep_indices);
  EXPECT_FALSE(result.entropy.has_value());
}

TEST(CompilerKvPolicy, LayerAlphaOfOneLayerIsTheGlobalAlpha) {
  fakes::PromptShape shape;
  shape.num_layers = 1;
  Sample sample;
  sample.prompt = fakes::SyntheticPrompt(shape);
  sample.table.head_weights.resize(4);
  sample.Reset();
  const auto global = Sets(sample.Run());
  sample.spec.parameters["alpha_scope"] = "layer";
  EXPECT_EQ(Sets(sample.Run()), global);
}

TEST(CompilerKvPolicy, HeadAlphaOfOneKvHeadIsTheLayerAlpha) {
  fakes::PromptShape shape;
  shape.num_kv_heads = 1;
  Sample sample;
  sample.prompt = fakes::SyntheticPrompt(shape);
  sample.Reset();
  sample.spec.parameters["alpha_scope"] = "layer";
  const auto layer = Sets(sample.Run());
  sample.spec.parameters["alpha_scope"] = "head";
  EXPECT_EQ(Sets(sample.Run()), layer);
}

TEST(CompilerKvPolicy, KvHeadScopeScoresBeforeTheMaximumOverHeads) {
  Sample sample;
  sample.spec.budget.tokens = 90;
  const OperationResult merged = sample.Run();
  sample.spec.scope = Scope::kKvHead;
  const OperationResult apart = sample.Run();
  for (size_t layer = 0; layer < apart.layers.size(); ++layer) {
    ASSERT_EQ(apart.layers[layer].keep_indices.size(), 2u);
    // A position reaches tau under the maximum exactly when some head reaches it.
    std::vector<char> any(sample.spec.seq_len, 0);
    for (const auto& set : apart.layers[layer].keep_indices) {
      for (const int32_t t : set) any[t] = 1;
    }
    std::vector<int32_t> joined;
    for (size_t t = 0; t < any.size(); ++t) {
      if (any[t]) joined.push_back(static_cast<int32_t>(t));
    }
    EXPECT_EQ(joined, merged.layers[layer].keep_indices[0]);
  }
}

TEST(CompilerKvPolicy, PoolKernelAveragesTheScores) {
  Sample sample;
  sample.spec.parameters["pool_kernel"] = "5";
  const auto expected = oracle::CompilerKvScores(sample.prompt, sample.table.head_weights, 64);
  const OperationResult result = sample.Run();
  EXPECT_NEAR(*result.entropy, expected.entropy, 1e-4);
  for (size_t layer = 0; layer < result.layers.size(); ++layer) {
    EXPECT_EQ(oracle::CheckKeepSet(result.layers[layer].keep_indices[0],
                                   oracle::AveragePool(expected.scores[layer], 5), 20, 0.9f),
              "");
  }
}

TEST(CompilerKvPolicy, HeadAlphaWeighsEachHeadsOwnAttention) {
  Sample sample;
  sample.spec.parameters["alpha_scope"] = "head";
  const auto expected = oracle::CompilerKvHeadAlphaScores(sample.prompt, sample.table.head_weights);
  const OperationResult result = sample.Run();
  EXPECT_NEAR(*result.layers.back().entropy, expected.entropy, 1e-4);
  for (size_t layer = 0; layer < result.layers.size(); ++layer) {
    EXPECT_EQ(oracle::CheckKeepSet(result.layers[layer].keep_indices[0], expected.scores[layer], 20,
                                   0.9f),
              "");
  }
}

TEST(CompilerKvPolicy, WindowPplThatOverflowsIsRefused) {
  Sample sample;
  sample.spec.parameters["window"] = "1";
  sample.spec.window_logprobs = {0.0f, 0.0f, -1000.0f};
  EXPECT_EQ(sample.BeginStatus().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(sample.BeginStatus().message(), HasSubstr("ppl=inf of the last 1 window_logprobs"));
}

TEST(CompilerKvPolicy, EvenPoolKernelIsRefused) {
  Sample sample;
  sample.spec.parameters["pool_kernel"] = "4";
  EXPECT_THAT(sample.BeginStatus().message(),
              HasSubstr("parameter pool_kernel=4, want an odd integer"));
}

TEST(CompilerKvPolicy, WindowUsesTheLastRowsOnly) {
  Sample sample;
  sample.spec.parameters["window"] = "3";
  const auto expected =
      oracle::CompilerKvScores(sample.prompt, sample.table.head_weights, /*window=*/3);
  const OperationResult result = sample.Run();
  EXPECT_NEAR(*result.entropy, expected.entropy, 1e-4);
  EXPECT_EQ(oracle::CheckKeepSet(result.layers[2].keep_indices[0], expected.scores[2], 20, 0.9f),
            "");
}

}  // namespace
}  // namespace keepset::engine
