// compilerkv against golden vector 1 of methods.md 1.6 and against plain fp64 loops.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/oracle.h"
#include "tests/engine/run_operation.h"

namespace keepset::engine {
namespace {

using ::testing::ElementsAre;

// T = 3, two heads, two rows.
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
  const ObservedLayer layer = {0, golden.observation()};
  kernels::ScoreBuffer* const all[] = {scores->get()};
  ASSERT_TRUE((*policy)->Score(context, absl::MakeConstSpan(&layer, 1), all).ok());
  ASSERT_TRUE((*policy)->Commit(context, absl::MakeConstSpan(&layer, 1), all).ok());
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

}  // namespace
}  // namespace keepset::engine
