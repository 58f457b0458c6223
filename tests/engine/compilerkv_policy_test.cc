// What compilerkv's scores do not depend on, and what its parameters change.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/casts.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/compilerkv_test_support.h"
#include "tests/engine/oracle.h"
#include "tests/engine/run_operation.h"

namespace keepset::engine {
namespace {

using testing::CompilerKvSample;
using ::testing::HasSubstr;
using testing::Sets;

TEST(CompilerKvPolicy, DoublingValuesChangesNothing) {
  CompilerKvSample sample;
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
  CompilerKvSample sample;
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
  CompilerKvSample sample;
  const auto before = Sets(sample.Run());
  CompilerKvSample permuted;
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

// The log-sum-exp of other logits, or in another base, would silently move alpha below the gate.
absl::Status StatusWithLse(const CompilerKvSample& sample, double offset) {
  Bench bench;
  absl::StatusOr<std::unique_ptr<Operation>> operation = bench.Begin(sample.spec);
  EXPECT_TRUE(operation.ok()) << operation.status();
  for (int64_t layer = 0; layer < sample.spec.model.num_layers; ++layer) {
    const std::vector<float> lse = sample.prompt.window_lse(layer, offset);
    const absl::Status status = (*operation)->Observe(layer, sample.prompt.observation(layer, lse));
    if (!status.ok()) return status;
  }
  return (*operation)->Finish().status();
}

TEST(CompilerKvPolicy, ALogSumExpThatIsNotOfTheseLogitsIsRefused) {
  for (const std::string scope : {"global", "layer", "head"}) {
    CompilerKvSample sample;
    sample.spec.parameters["alpha_scope"] = scope;
    EXPECT_TRUE(StatusWithLse(sample, 0.0).ok()) << scope;
    EXPECT_TRUE(StatusWithLse(sample, 0.01).ok()) << scope;
    for (const double offset : {-2.0, 2.0}) {
      const absl::Status status = StatusWithLse(sample, offset);
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << scope;
      EXPECT_THAT(status.message(), HasSubstr("window_lse"));
      EXPECT_THAT(status.message(), HasSubstr(scope == "global" ? "all layers" : "layer 0"));
    }
  }
}

// In bf16 a log-sum-exp of 20 can be off by .06 and one of 100 by .25.
TEST(CompilerKvPolicy, ALogSumExpMayBeOffByTheRoundingOfItsType) {
  CompilerKvSample sample;
  fakes::PromptShape shape = sample.prompt.shape();
  shape.dtype = kernels::DType::kBF16;
  sample.prompt = fakes::SyntheticPrompt(shape);
  sample.Reset();
  const auto status_in_bf16 = [&](double offset) {
    Bench bench;
    absl::StatusOr<std::unique_ptr<Operation>> operation = bench.Begin(sample.spec);
    EXPECT_TRUE(operation.ok()) << operation.status();
    for (int64_t layer = 0; layer < sample.spec.model.num_layers; ++layer) {
      const std::vector<float> exact = sample.prompt.window_lse(layer, offset);
      std::vector<uint16_t> rounded;
      for (const float value : exact) {
        rounded.push_back(static_cast<uint16_t>((absl::bit_cast<uint32_t>(value) + 0x8000) >> 16));
      }
      LayerObservation observation = sample.prompt.observation(layer, exact);
      observation.window_lse.data = reinterpret_cast<const std::byte*>(rounded.data());
      observation.window_lse.size_bytes = static_cast<int64_t>(rounded.size() * sizeof(uint16_t));
      observation.window_lse.dtype = kernels::DType::kBF16;
      const absl::Status status = (*operation)->Observe(layer, observation);
      if (!status.ok()) return status;
    }
    return (*operation)->Finish().status();
  };
  for (const std::string scope : {"global", "layer", "head"}) {
    sample.spec.parameters["alpha_scope"] = scope;
    EXPECT_FALSE(StatusWithLse(sample, 0.1).ok()) << scope;
    EXPECT_TRUE(status_in_bf16(0.1).ok()) << scope << ": " << status_in_bf16(0.1);
    EXPECT_FALSE(status_in_bf16(2.0).ok()) << scope;
  }
}

TEST(CompilerKvPolicy, LayerAlphaAnswersWhileStreamingWithItsOwnEntropy) {
  CompilerKvSample sample;
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
  CompilerKvSample sample;
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
  CompilerKvSample sample;
  sample.prompt = fakes::SyntheticPrompt(shape);
  sample.Reset();
  sample.spec.parameters["alpha_scope"] = "layer";
  const auto layer = Sets(sample.Run());
  sample.spec.parameters["alpha_scope"] = "head";
  EXPECT_EQ(Sets(sample.Run()), layer);
}

TEST(CompilerKvPolicy, KvHeadScopeScoresBeforeTheMaximumOverHeads) {
  CompilerKvSample sample;
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
  CompilerKvSample sample;
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
  CompilerKvSample sample;
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

TEST(CompilerKvPolicy, EvenPoolKernelIsRefused) {
  CompilerKvSample sample;
  sample.spec.parameters["pool_kernel"] = "4";
  EXPECT_THAT(sample.BeginStatus().message(),
              HasSubstr("parameter pool_kernel=4, want an odd integer"));
}

TEST(CompilerKvPolicy, WindowUsesTheLastRowsOnly) {
  CompilerKvSample sample;
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
