// Every request that is refused, with its code and what the message says.
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/run_operation.h"

namespace keepset::engine {
namespace {

using ::testing::HasSubstr;

OperationSpec GoodSpec(const fakes::SyntheticPrompt& prompt) {
  OperationSpec spec = prompt.spec();
  spec.policy = "compilerkv";
  spec.budget.kind = Budget::Kind::kTokens;
  spec.budget.tokens = 10;
  spec.table = fakes::MakeTable(prompt.model(), {});
  return spec;
}

struct BadSpec {
  std::string name;
  std::function<void(OperationSpec&)> damage;
  absl::StatusCode code;
  std::string message;
};

class RefusedSpec : public ::testing::TestWithParam<BadSpec> {};

TEST_P(RefusedSpec, SaysWhereTheValueAndWhatWouldBeRight) {
  const fakes::SyntheticPrompt prompt{fakes::PromptShape{}};
  OperationSpec spec = GoodSpec(prompt);
  ASSERT_TRUE(Bench().Begin(spec).ok());
  GetParam().damage(spec);
  const absl::Status status = Bench().Begin(spec).status();
  EXPECT_EQ(status.code(), GetParam().code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().message));
}

constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::vector<BadSpec> BadSpecs() {
  return {
      {"NoTokens", [](OperationSpec& s) { s.seq_len = 0; }, kInvalid, "seq_len=0, want 1.."},
      {"TooManyTokens", [](OperationSpec& s) { s.seq_len = int64_t{1} << 40; }, kInvalid,
       "seq_len=1099511627776, want 1..16777216"},
      {"TooManyKeptPositions",
       [](OperationSpec& s) {
         s.seq_len = int64_t{1} << 24;
         s.model.num_layers = 65;
       },
       kInvalid, "num_layers x num_kv_heads x seq_len = 2181038080, want at most 2147483648"},
      {"TooManyHeadsForALongPrompt",
       [](OperationSpec& s) {
         s.seq_len = int64_t{1} << 20;
         s.model.num_qo_heads = 1024;
         s.table = fakes::MakeTable(s.model, {});
       },
       kInvalid, "num_qo_heads x seq_len = 1073741824, want at most 536870912"},
      {"WindowLongerThanPrompt", [](OperationSpec& s) { s.num_rows = 97; }, kInvalid,
       "num_rows (window)=97, want 1..96"},
      {"NoObservedRows", [](OperationSpec& s) { s.num_rows = 0; }, kInvalid,
       "num_rows (window)=0, want 1..96"},
      {"NegativeRows", [](OperationSpec& s) { s.num_rows = -1; }, kInvalid, "=-1, want 1..96"},
      {"NoLayers", [](OperationSpec& s) { s.model.num_layers = 0; }, kInvalid, "num_layers=0"},
      {"HeadsNotAMultiple", [](OperationSpec& s) { s.model.num_kv_heads = 3; }, kInvalid,
       "num_qo_heads=4, want a multiple of num_kv_heads=3"},
      {"NoHeadDim", [](OperationSpec& s) { s.model.head_dim = 0; }, kInvalid, "head_dim=0"},
      {"RowPositionsOfAnotherCount",
       [](OperationSpec& s) {
         s.row_positions = {1, 2};
       },
       kInvalid, "row_positions: entries=2, want 8"},
      {"RowPositionsDescending",
       [](OperationSpec& s) { s.row_positions = {0, 1, 2, 3, 4, 5, 9, 7}; }, kInvalid,
       "row_positions[7]=7, want ascending, above 9"},
      {"RowPositionRepeated", [](OperationSpec& s) { s.row_positions = {0, 1, 2, 3, 4, 5, 5, 7}; },
       kInvalid, "row_positions[6]=5, want ascending, above 5"},
      {"RowPositionBeyondPrompt",
       [](OperationSpec& s) { s.row_positions = {0, 1, 2, 3, 4, 5, 6, 96}; }, kInvalid,
       "row_positions[7]=96, want 0..95"},
      {"ScaleNotFinite",
       [](OperationSpec& s) { s.softmax_scale = std::numeric_limits<float>::quiet_NaN(); },
       kInvalid, "softmax_scale=nan, want finite and above 0"},
      {"ScaleNegative", [](OperationSpec& s) { s.softmax_scale = -1.0f; }, kInvalid,
       "softmax_scale=-1, want finite and above 0"},
      {"UnknownDType", [](OperationSpec& s) { s.kv_dtype = static_cast<kernels::DType>(9); },
       kInvalid, "kv_dtype: dtype 9, want f32, f16 or bf16"},
      {"BudgetZero", [](OperationSpec& s) { s.budget.tokens = 0; }, kInvalid,
       "budget_tokens=0, want 1 or more"},
      {"BudgetNegative", [](OperationSpec& s) { s.budget.tokens = -5; }, kInvalid,
       "budget_tokens=-5, want 1 or more"},
      {"FractionZero", [](OperationSpec& s) { s.budget.kind = Budget::Kind::kKeptFraction; },
       kInvalid, "kept_fraction=0, want above 0 and at most 1"},
      {"FractionAboveOne",
       [](OperationSpec& s) {
         s.budget.kind = Budget::Kind::kKeptFraction;
         s.budget.kept_fraction = 1.5;
       },
       kInvalid, "kept_fraction=1.5, want above 0 and at most 1"},
      {"FractionNotANumber",
       [](OperationSpec& s) {
         s.budget.kind = Budget::Kind::kKeptFraction;
         s.budget.kept_fraction = kNan;
       },
       kInvalid, "kept_fraction=nan"},
      {"BytesBelowOneToken",
       [](OperationSpec& s) {
         s.budget.kind = Budget::Kind::kBytes;
         s.budget.bytes = 255;
       },
       kInvalid, "budget_bytes=255, want at least 256"},
      {"NoBudgetAndNoDefault", [](OperationSpec& s) { s.budget = {}; }, kInvalid, "budget"},
      {"NoBudgetAndNoTable",
       [](OperationSpec& s) {
         s.budget = {};
         s.policy = "snapkv";
       },
       kInvalid, "policy snapkv: no budget and no table that states one"},
      {"UnknownPolicy", [](OperationSpec& s) { s.policy = "snapvk"; }, absl::StatusCode::kNotFound,
       "unknown policy 'snapvk', known are compilerkv, snapkv, streaming_llm, tova, knorm, random, "
       "full"},
      {"UnknownParameter", [](OperationSpec& s) { s.parameters["windw"] = "3"; }, kInvalid,
       "policy compilerkv: unknown parameter windw=3, known are alpha_scope, dilate"},
      {"ParameterOfAnotherPolicy", [](OperationSpec& s) { s.parameters["kernel_size"] = "3"; },
       kInvalid, "unknown parameter kernel_size=3"},
      {"UnknownParameterOfFull",
       [](OperationSpec& s) {
         s.policy = "full";
         s.parameters["dilate"] = "1";
       },
       kInvalid, "policy full: unknown parameter dilate=1, want none"},
      {"ParameterOutOfRange", [](OperationSpec& s) { s.parameters["window"] = "0"; }, kInvalid,
       "parameter window=0, want an integer in 1.."},
      {"ParameterNotANumber", [](OperationSpec& s) { s.parameters["min_kept"] = "two"; }, kInvalid,
       "parameter min_kept=two, want an integer"},
      {"ParameterNotAChoice", [](OperationSpec& s) { s.parameters["alpha_scope"] = "prompt"; },
       kInvalid, "parameter alpha_scope=prompt, want one of global, layer, head"},
      {"ProtectedSpanBeyondPrompt",
       [](OperationSpec& s) {
         s.protect_spans = {{"doc", 90, 97}};
       },
       kInvalid, "protect_spans[0] 'doc' is [90, 97), want 0 <= begin < end <= 96"},
      {"ProtectedSpanReversed",
       [](OperationSpec& s) {
         s.protect_spans = {{"doc", 9, 3}};
       },
       kInvalid, "protect_spans[0] 'doc' is [9, 3)"},
      {"ProtectedSinkNegative", [](OperationSpec& s) { s.protect_sink = -1; }, kInvalid,
       "protect_sink=-1, want 0 or more"},
      {"ProtectedWindowNegative", [](OperationSpec& s) { s.protect_window = -1; }, kInvalid,
       "protect_window=-1, want 0 or more"},
      {"MoreProtectedThanBudget",
       [](OperationSpec& s) {
         s.protect_sink = 6;
         s.protect_window = 5;
       },
       kInvalid, "11 protected positions, want at most the budget of 10"},
      {"PplNotFinite", [](OperationSpec& s) { s.ppl = kNan; }, kInvalid,
       "ppl=nan, want finite and above 0"},
      {"PplZero", [](OperationSpec& s) { s.ppl = 0.0; }, kInvalid,
       "ppl=0, want finite and above 0"},
      {"LogProbabilityNotFinite",
       [](OperationSpec& s) {
         s.window_logprobs = {-1.0f, -std::numeric_limits<float>::infinity()};
       },
       kInvalid, "window_logprobs[1]=-inf, want finite"},
      {"LogProbabilitiesOverflow", [](OperationSpec& s) { s.window_logprobs = {-1e6f}; }, kInvalid,
       "ppl=inf, want finite and above 0"},
  };
}

INSTANTIATE_TEST_SUITE_P(Spec, RefusedSpec, ::testing::ValuesIn(BadSpecs()),
                         [](const auto& info) { return info.param.name; });

struct BadLayer {
  std::string name;
  std::function<void(LayerObservation&)> damage;
  std::string message;
};

class RefusedObservation : public ::testing::TestWithParam<BadLayer> {};

TEST_P(RefusedObservation, SaysLayerTensorValueAndWhatWouldBeRight) {
  const fakes::SyntheticPrompt prompt{fakes::PromptShape{}};
  Bench bench;
  const auto operation = bench.Begin(GoodSpec(prompt));
  ASSERT_TRUE(operation.ok());
  LayerObservation observation = prompt.observation(0);
  GetParam().damage(observation);
  const absl::Status status = (*operation)->Observe(0, observation);
  EXPECT_EQ(status.code(), kInvalid) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().message));
}

std::vector<BadLayer> BadLayers() {
  return {
      {"NoObservation", [](LayerObservation& o) { o.q_window = {}; },
       "layer 0: missing q_window (or attn_tile, or column_stats), policy compilerkv needs it"},
      {"QueriesWithoutKeys", [](LayerObservation& o) { o.k = {}; },
       "layer 0: missing k beside q_window"},
      {"NoValues", [](LayerObservation& o) { o.v = {}; },
       "layer 0: missing v, policy compilerkv needs it"},
      {"KeysOfAnotherDType", [](LayerObservation& o) { o.k.dtype = kernels::DType::kF16; },
       "layer 0: k: dtype f16, want f32"},
      {"ValuesOfAnotherHeadCount", [](LayerObservation& o) { o.v.num_kv_heads = 4; },
       "layer 0: v: num_kv_heads=4, want 2"},
      {"KeysOfAnotherLength", [](LayerObservation& o) { o.k.seq_len = 97; },
       "layer 0: k: seq_len=97, want 96"},
      {"QueriesOfAnotherRowCount", [](LayerObservation& o) { o.q_window.num_rows = 7; },
       "layer 0: q_window: num_rows=7, want 8"},
      {"QueriesOfAnotherHeadDim", [](LayerObservation& o) { o.q_window.head_dim = 8; },
       "layer 0: q_window: head_dim=8, want 16"},
      {"KeyStrideBeyondTheBuffer", [](LayerObservation& o) { o.k.token_stride = 1000; },
       "layer 0: k"},
      {"KeyStridesOverflow",
       [](LayerObservation& o) { o.k.head_stride = std::numeric_limits<int64_t>::max(); },
       "layer 0: k"},
      {"ValuesShorterThanTheirShape", [](LayerObservation& o) { o.v.size_bytes -= 1; },
       "layer 0: v"},
      {"UnknownDType",
       [](LayerObservation& o) { o.q_window.dtype = static_cast<kernels::DType>(7); },
       "layer 0: q_window: dtype 7, want f32, f16 or bf16"},
      {"LseOfAnotherHeadCount",
       [](LayerObservation& o) {
         static constexpr float kLse[32] = {};
         o.window_lse.data = reinterpret_cast<const std::byte*>(kLse);
         o.window_lse.size_bytes = sizeof(kLse);
         o.window_lse.num_qo_heads = 2;
         o.window_lse.num_rows = 8;
         o.window_lse.head_stride = 8;
       },
       "layer 0: window_lse: num_qo_heads=2, want 4"},
  };
}

INSTANTIATE_TEST_SUITE_P(Layer, RefusedObservation, ::testing::ValuesIn(BadLayers()),
                         [](const auto& info) { return info.param.name; });

TEST(BadRequest, BlockIdOutsideTheBufferIsRefused) {
  fakes::PromptShape shape;
  shape.layout = fakes::KvLayout::kPaged;
  const fakes::SyntheticPrompt prompt(shape);
  Bench bench;
  const auto operation = bench.Begin(GoodSpec(prompt));
  ASSERT_TRUE(operation.ok());
  LayerObservation observation = prompt.observation(0);
  const std::vector<int32_t> blocks = {0, 1, 2, 3, 4, 600};
  observation.k.block_table = blocks;
  const absl::Status status = (*operation)->Observe(0, observation);
  EXPECT_EQ(status.code(), kInvalid);
  EXPECT_THAT(status.message(), HasSubstr("layer 0: k"));
  EXPECT_THAT(status.message(), HasSubstr("600"));
}

TEST(BadRequest, QueriesWithoutScaleAreRefused) {
  const fakes::SyntheticPrompt prompt{fakes::PromptShape{}};
  OperationSpec spec = GoodSpec(prompt);
  spec.softmax_scale = 0.0f;
  Bench bench;
  const auto operation = bench.Begin(spec);
  ASSERT_TRUE(operation.ok());
  EXPECT_EQ((*operation)->Observe(0, prompt.observation(0)).message(),
            "layer 0: q_window is observed with softmax_scale=0, want above 0");
}

TEST(BadRequest, UnknownScopeListsTheKnownOnes) {
  EXPECT_EQ(ParseScope("per_layer").status().message(),
            "scope 'per_layer', want layer_elastic, layer_equal, sequence or kv_head");
}

TEST(Budget, KeptFractionIsFlooredInDouble) {
  OperationSpec spec = TensorlessSpec("random", 1, 1000, 0);
  spec.budget.kind = Budget::Kind::kKeptFraction;
  spec.budget.kept_fraction = 1.0 - 0.9;  // 0.09999999999999998
  const auto result = Bench().Run(spec);
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(result->budget_tokens, 99);
}

TEST(Budget, KeptFractionKeepsAtLeastOne) {
  OperationSpec spec = TensorlessSpec("random", 1, 5, 0);
  spec.budget.kind = Budget::Kind::kKeptFraction;
  spec.budget.kept_fraction = 0.01;
  const auto result = Bench().Run(spec);
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(result->layers[0].keep_indices[0].size(), 1u);
}

TEST(Budget, BytesAreDividedByOneTokenOverAllKvHeads) {
  OperationSpec spec = TensorlessSpec("random", 1, 100, 0);
  spec.kv_dtype = kernels::DType::kBF16;
  spec.budget.kind = Budget::Kind::kBytes;
  // 2 KV heads x (8 + 8) x 2 bytes = 64.
  spec.budget.bytes = 64 * 7 + 63;
  const auto result = Bench().Run(spec);
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(result->budget_tokens, 7);
}

TEST(Budget, ValueHeadDimCountsInBytes) {
  OperationSpec spec = TensorlessSpec("random", 1, 100, 0);
  spec.value_head_dim = 24;
  spec.budget.kind = Budget::Kind::kBytes;
  spec.budget.bytes = 2 * (8 + 24) * 4 * 3;
  const auto result = Bench().Run(spec);
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(result->budget_tokens, 3);
}

TEST(Protection, SinkLongerThanThePromptIsThePrompt) {
  OperationSpec spec = TensorlessSpec("random", 1, 3, 8);
  spec.protect_sink = 4;
  spec.protect_window = 64;
  const auto result = Bench().Run(spec);
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(result->reason, Reason::kBelowBudget);
}

}  // namespace
}  // namespace keepset::engine
