// What every listed policy promises in every scope (engine/policies/retention_policy.h). A new line
// in policies.def is covered without a change here.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/status_macros.h"
#include "engine/input_needs.h"
#include "gtest/gtest.h"
#include "tests/engine/run_operation.h"

namespace keepset::engine {
namespace {

using Case = std::tuple<std::string, Scope>;

constexpr int64_t kBudget = 20;

class RetentionPolicyConformance : public ::testing::TestWithParam<Case> {
 protected:
  OperationSpec Spec(int64_t budget) const {
    OperationSpec spec = prompt_.spec();
    spec.policy = std::get<0>(GetParam());
    spec.scope = std::get<1>(GetParam());
    spec.budget.kind = Budget::Kind::kTokens;
    spec.budget.tokens = budget;
    spec.table = fakes::MakeTableFor(spec.policy, prompt_.model());
    spec.ppl = 10.0;
    return spec;
  }

  bool keeps_everything() const { return std::get<0>(GetParam()) == "full"; }

  OperationResult Decide(const OperationSpec& spec, int num_threads = 1) const {
    absl::StatusOr<OperationResult> result = Bench(num_threads).Run(spec, prompt_);
    EXPECT_TRUE(result.ok()) << result.status();
    return result.ok() ? *std::move(result) : OperationResult{};
  }

  fakes::SyntheticPrompt prompt_{fakes::PromptShape{}};
};

std::vector<std::vector<int32_t>> Sets(const OperationResult& result) {
  std::vector<std::vector<int32_t>> sets;
  for (const LayerResult& layer : result.layers) {
    sets.insert(sets.end(), layer.keep_indices.begin(), layer.keep_indices.end());
  }
  return sets;
}

TEST_P(RetentionPolicyConformance, StaysWithinTheBudgetAndNeverEndsEmpty) {
  for (const int64_t budget : {int64_t{1}, int64_t{5}, kBudget, int64_t{95}}) {
    for (const auto& set : Sets(Decide(Spec(budget)))) {
      EXPECT_GE(set.size(), 1u);
      const int64_t most = keeps_everything() ? prompt_.shape().seq_len : budget;
      EXPECT_LE(static_cast<int64_t>(set.size()), most);
    }
  }
}

TEST_P(RetentionPolicyConformance, PositionsAreStrictlyAscendingAndInThePrompt) {
  for (const auto& set : Sets(Decide(Spec(kBudget)))) {
    EXPECT_TRUE(std::adjacent_find(set.begin(), set.end(), std::greater_equal<>()) == set.end());
    EXPECT_GE(set.front(), 0);
    EXPECT_LT(set.back(), prompt_.shape().seq_len);
  }
}

TEST_P(RetentionPolicyConformance, ProtectedPositionsAreKept) {
  OperationSpec spec = Spec(kBudget);
  spec.protect_sink = 2;
  spec.protect_window = 3;
  spec.protect_spans = {{"span", 40, 45}};
  const std::vector<int32_t> kept_always = {0, 1, 40, 41, 42, 43, 44, 93, 94, 95};
  for (const auto& set : Sets(Decide(spec))) {
    EXPECT_TRUE(std::includes(set.begin(), set.end(), kept_always.begin(), kept_always.end()));
  }
}

TEST_P(RetentionPolicyConformance, ABudgetOfProtectedPositionsKeepsNothingElse) {
  OperationSpec spec = Spec(5);
  spec.protect_spans = {{"span", 40, 45}};
  const size_t want = keeps_everything() ? 96 : 5;
  for (const auto& set : Sets(Decide(spec))) EXPECT_EQ(set.size(), want);
}

TEST_P(RetentionPolicyConformance, IsTheSameForAnyThreadCount) {
  const auto one = Sets(Decide(Spec(kBudget), 1));
  EXPECT_EQ(Sets(Decide(Spec(kBudget), 2)), one);
  EXPECT_EQ(Sets(Decide(Spec(kBudget), 8)), one);
}

TEST_P(RetentionPolicyConformance, IsTheSameFromRunToRun) {
  EXPECT_EQ(Sets(Decide(Spec(kBudget))), Sets(Decide(Spec(kBudget))));
}

// 5 layers by 2, and all at once.
TEST_P(RetentionPolicyConformance, LayersTogetherAreDecidedAsOneByOne) {
  prompt_ = fakes::SyntheticPrompt({.num_layers = 5});
  const OperationResult alone = Decide(Spec(kBudget));
  for (const int64_t layers_at_once : {2, 8}) {
    fakes::Gate gate;
    Bench bench(NewCpuBackendOfManyLayers(gate, layers_at_once));
    const absl::StatusOr<OperationResult> together = bench.RunTogether(Spec(kBudget), prompt_);
    ASSERT_TRUE(together.ok()) << together.status();
    EXPECT_EQ(Sets(*together), Sets(alone));
    EXPECT_EQ(together->entropy, alone.entropy);
    EXPECT_EQ(together->outside_mass, alone.outside_mass);
    for (size_t layer = 0; layer < alone.layers.size(); ++layer) {
      EXPECT_EQ(together->layers[layer].tau, alone.layers[layer].tau);
      EXPECT_EQ(together->layers[layer].candidates, alone.layers[layer].candidates);
      EXPECT_EQ(together->layers[layer].filled, alone.layers[layer].filled);
    }
  }
}

// However many wait when somebody looks: cut into groups at random.
TEST_P(RetentionPolicyConformance, LayersInAnyGroupsAreDecidedAsOneByOne) {
  constexpr int64_t kLayers = 7;
  prompt_ = fakes::SyntheticPrompt({.num_layers = kLayers});
  const OperationResult alone = Decide(Spec(kBudget));
  std::vector<ObservedLayer> layers;
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    layers.push_back({layer, prompt_.observation(layer)});
  }
  std::mt19937 rng(5);
  for (int i = 0; i < 4; ++i) {
    fakes::Gate gate;
    Bench bench(NewCpuBackendOfManyLayers(gate, 4));
    const auto operation = bench.Begin(Spec(kBudget));
    ASSERT_TRUE(operation.ok()) << operation.status();
    for (size_t begin = 0; begin < layers.size();) {
      const size_t count = 1 + rng() % (layers.size() - begin);
      ASSERT_TRUE(
          (*operation)->ObserveLayers(absl::MakeConstSpan(layers).subspan(begin, count)).ok());
      begin += count;
    }
    const auto together = (*operation)->Finish();
    ASSERT_TRUE(together.ok()) << together.status();
    EXPECT_EQ(Sets(**together), Sets(alone));
    EXPECT_EQ((*together)->entropy, alone.entropy);
    EXPECT_EQ((*together)->outside_mass, alone.outside_mass);
  }
}

// Layer 2 of 5 is bad: what is said, and that it may be repeated.
TEST_P(RetentionPolicyConformance, LayersTogetherAreRefusedAsOneByOne) {
  prompt_ = fakes::SyntheticPrompt({.num_layers = 5});
  fakes::SyntheticPrompt bad = prompt_;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (int64_t layer = 2; layer < 4; ++layer) {
    bad.set_k(layer, 1, 7, 0, nan);
    bad.set_v(layer, 1, 7, 0, nan);
  }
  const absl::Status alone = Bench().Run(Spec(kBudget), bad).status();
  fakes::Gate gate;
  Bench bench(NewCpuBackendOfManyLayers(gate, 4));
  EXPECT_EQ(bench.RunTogether(Spec(kBudget), bad).status(), alone);
  if (alone.ok()) return;
  EXPECT_EQ(alone.message().substr(0, 9), "layer 2: ");
  auto operation = bench.Begin(Spec(kBudget));
  ASSERT_TRUE(operation.ok());
  std::vector<ObservedLayer> layers;
  for (int64_t layer = 0; layer < 5; ++layer) layers.push_back({layer, bad.observation(layer)});
  EXPECT_EQ((*operation)->ObserveLayers(layers), alone);
  for (int64_t layer = 2; layer < 5; ++layer)
    layers[layer].observation = prompt_.observation(layer);
  ASSERT_TRUE((*operation)->ObserveLayers(absl::MakeConstSpan(layers).subspan(2)).ok());
  const auto result = (*operation)->Finish();
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(Sets(**result), Sets(Decide(Spec(kBudget))));
}

TEST_P(RetentionPolicyConformance, KeepsEverythingWhenTheBudgetCoversThePrompt) {
  const int64_t seq_len = prompt_.shape().seq_len;
  for (const int64_t budget : {seq_len, seq_len + 1, int64_t{1} << 40}) {
    const OperationResult result = Decide(Spec(budget));
    EXPECT_EQ(result.outcome, Outcome::kKeptFull);
    for (const auto& set : Sets(result)) EXPECT_EQ(static_cast<int64_t>(set.size()), seq_len);
    EXPECT_EQ(result.bytes_after, result.bytes_before);
  }
}

TEST_P(RetentionPolicyConformance, SetCountFollowsTheScope) {
  const OperationResult result = Decide(Spec(kBudget));
  const size_t want = std::get<1>(GetParam()) == Scope::kKvHead ? prompt_.shape().num_kv_heads : 1;
  ASSERT_EQ(static_cast<int64_t>(result.layers.size()), prompt_.shape().num_layers);
  for (const LayerResult& layer : result.layers) EXPECT_EQ(layer.keep_indices.size(), want);
}

TEST_P(RetentionPolicyConformance, CountsAreEqualWhereTheScopeSaysSo) {
  const OperationResult result = Decide(Spec(kBudget));
  std::vector<size_t> counts;
  for (const LayerResult& layer : result.layers) {
    counts.push_back(layer.keep_indices.front().size());
  }
  const Scope scope = std::get<1>(GetParam());
  const bool is_equal = std::equal(counts.begin() + 1, counts.end(), counts.begin());
  EXPECT_TRUE(is_equal || scope == Scope::kLayerElastic || scope == Scope::kKvHead);
}

TEST_P(RetentionPolicyConformance, SetsAreTheSameWhereTheScopeSaysSo) {
  const auto sets = Sets(Decide(Spec(kBudget)));
  const bool is_same = std::equal(sets.begin() + 1, sets.end(), sets.begin());
  EXPECT_TRUE(is_same || std::get<1>(GetParam()) != Scope::kSequence);
}

TEST_P(RetentionPolicyConformance, OnePositionIsAPrompt) {
  fakes::PromptShape shape;
  shape.seq_len = 1;
  shape.num_rows = 1;
  prompt_ = fakes::SyntheticPrompt(shape);
  const OperationResult result = Decide(Spec(1));
  EXPECT_EQ(result.outcome, Outcome::kKeptFull);
}

// Attention of `prompt` by rows, and added up per column: [H, W, T] and [H, T].
struct Attention {
  explicit Attention(const fakes::PromptShape& shape)
      : tile(shape.num_qo_heads * shape.num_rows * shape.seq_len),
        sums(shape.num_qo_heads * shape.seq_len) {
    for (int64_t head = 0; head < shape.num_qo_heads; ++head) {
      for (int64_t row = 0; row < shape.num_rows; ++row) {
        for (int64_t t = 0; t <= shape.seq_len - shape.num_rows + row; ++t) {
          const float value = static_cast<float>((7 * head + 3 * row + 11 * t) % 16) / 64.0f;
          tile[(head * shape.num_rows + row) * shape.seq_len + t] = value;
          sums[head * shape.seq_len + t] += value;
        }
      }
    }
  }
  std::vector<float> tile;
  std::vector<float> sums;
};

TEST_P(RetentionPolicyConformance, ColumnStatisticsDecideLikeTheirTileOrAreRefused) {
  const auto policies = NewBuiltinPolicyRegistry();
  const absl::StatusOr<InputNeeds> needs = DescribeNeeds(Spec(kBudget), *policies);
  ASSERT_TRUE(needs.ok()) << needs.status();
  fakes::PromptShape shape;
  if (needs->max_rows > 0) shape.num_rows = std::min(shape.num_rows, needs->max_rows);
  prompt_ = fakes::SyntheticPrompt(shape);
  const Attention attention(shape);
  const auto decide = [&](bool by_columns) -> absl::StatusOr<OperationResult> {
    Bench bench;
    KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<Operation> operation,
                             bench.Begin(Spec(kBudget)));
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
      LayerObservation observation = prompt_.observation(layer);
      observation.q_window = {};
      if (by_columns) {
        observation.column_stats = {reinterpret_cast<const std::byte*>(attention.sums.data()),
                                    static_cast<int64_t>(attention.sums.size() * sizeof(float)),
                                    kernels::DType::kF32,
                                    shape.num_qo_heads,
                                    shape.seq_len,
                                    shape.seq_len};
        observation.column_reduction = ColumnReduction::kSum;
      } else {
        observation.attn_tile = {reinterpret_cast<const std::byte*>(attention.tile.data()),
                                 static_cast<int64_t>(attention.tile.size() * sizeof(float)),
                                 kernels::DType::kF32,
                                 shape.num_qo_heads,
                                 shape.num_rows,
                                 shape.seq_len,
                                 shape.num_rows * shape.seq_len,
                                 shape.seq_len};
      }
      KEEPSET_RETURN_IF_ERROR(operation->Observe(layer, observation));
    }
    KEEPSET_ASSIGN_OR_RETURN(const OperationResult* const result, operation->Finish());
    return *result;
  };
  const absl::StatusOr<OperationResult> by_tile = decide(false);
  const absl::StatusOr<OperationResult> by_columns = decide(true);
  ASSERT_TRUE(by_tile.ok()) << by_tile.status();
  const bool reads_attention = std::any_of(needs->layers.begin(), needs->layers.end(),
                                           [](const auto& layer) { return layer.queries; });
  if (reads_attention && !needs->layers.front().columns) {
    EXPECT_EQ(by_columns.status().code(), absl::StatusCode::kInvalidArgument);
    return;
  }
  ASSERT_TRUE(by_columns.ok()) << by_columns.status();
  EXPECT_EQ(Sets(*by_columns), Sets(*by_tile));
}

std::vector<Case> AllCases() {
  std::vector<Case> cases;
  const auto registry = NewBuiltinPolicyRegistry();
  for (const std::string& name : registry->Names()) {
    for (const Scope scope :
         {Scope::kLayerElastic, Scope::kLayerEqual, Scope::kSequence, Scope::kKvHead}) {
      cases.emplace_back(name, scope);
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(EveryPolicy, RetentionPolicyConformance, ::testing::ValuesIn(AllCases()),
                         [](const auto& info) {
                           // Test names have no underscores; the names of policies and scopes do.
                           std::string name = std::get<0>(info.param) + "In" +
                                              std::string(ScopeName(std::get<1>(info.param)));
                           name.erase(std::remove(name.begin(), name.end(), '_'), name.end());
                           return name;
                         });

}  // namespace
}  // namespace keepset::engine
