// Whole operations of every policy on both backends: not the same bits, but the same sets up to
// positions whose score lies at the cut; and the same sets where scores are equal by construction.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/observation_heads_test_support.h"
#include "tests/engine/oracle.h"
#include "tests/engine/run_operation.h"
#include "tests/fakes/test_seed.h"
#include "tests/kernels/cuda/cublas_fixture.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/device_prompt.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

namespace {

using engine::Bench;
using engine::OperationResult;
using engine::OperationSpec;
using engine::Scope;

// Of the kept positions of an operation, those that both backends keep.
constexpr double kLeastOverlap = 0.97;
// How far from the cut a position may lie that only one of them keeps, relative to the cut: fp32
// sums of a few hundred exponentials in two orders, and the device's approximate exponential.
constexpr double kMargin = 1e-4;
// Scores of either sign may have their cut at zero.
constexpr double kLeastScale = 1e-2;
constexpr int64_t kBudget = 40;

using Set = std::vector<int32_t>;
using Scores = std::vector<double>;  // [T]

struct PolicyCase {
  std::string name;
  std::string policy;
  std::map<std::string, std::string> parameters;
  bool is_pooled = false;
  std::string window_kernels = {};

  std::string TestName() const { return name + (window_kernels.empty() ? "" : "ByCublas"); }
};

std::vector<PolicyCase> Policies() {
  return {
      {"SnapKv", "snapkv", {}, true},
      {"SnapKvWide", "snapkv", {{"kernel_size", "41"}}, true},
      {"Tova", "tova", {}},
      {"CompilerKv", "compilerkv", {}},
      {"CompilerKvOfLayers", "compilerkv", {{"alpha_scope", "layer"}, {"pool_kernel", "3"}}, true},
      {"CompilerKvOfHeads", "compilerkv", {{"alpha_scope", "head"}}},
      {"ObservationHeads", "observation_heads", {}, true},
      {"Knorm", "knorm", {}},
      {"SnapKv", "snapkv", {}, true, "cublas"},
      {"CompilerKv", "compilerkv", {}, false, "cublas"},
      {"ObservationHeads", "observation_heads", {}, true, "cublas"}};
}

std::vector<Set> SetsOf(const OperationResult& result) {
  std::vector<Set> sets;
  for (const engine::LayerResult& layer : result.layers) {
    sets.insert(sets.end(), layer.keep_indices.begin(), layer.keep_indices.end());
  }
  return sets;
}

// Head weights that differ, so that heads and layers do not cancel out.
std::vector<float> HeadWeights(const fakes::SyntheticPrompt& prompt) {
  std::vector<float> weights;
  for (int64_t i = 0; i < prompt.shape().num_layers * prompt.shape().num_qo_heads; ++i) {
    weights.push_back(0.8f + 0.1f * static_cast<float>(i * 5 % 8));
  }
  return weights;
}

OperationSpec SpecOf(const PolicyCase& policy, const fakes::SyntheticPrompt& prompt) {
  OperationSpec spec = prompt.spec();
  spec.policy = policy.policy;
  spec.parameters = policy.parameters;
  spec.budget.kind = engine::Budget::Kind::kTokens;
  spec.budget.tokens = kBudget;
  spec.ppl = 10.0;
  fakes::TableSample sample;
  sample.head_weights = HeadWeights(prompt);
  spec.table = policy.policy == "compilerkv" ? fakes::MakeTable(prompt.model(), sample)
                                             : fakes::MakeTableFor(policy.policy, prompt.model());
  return spec;
}

class OperationParity : public CudaTest, public ::testing::WithParamInterface<PolicyCase> {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    const bool is_cublas = GetParam().window_kernels == "cublas";
    auto backend = NewCudaBackend(is_cublas ? CublasOptions() : BackendOptions());
    if (const std::string absent = is_cublas ? WhyNoCublas(CublasOptions()) : ""; !absent.empty()) {
      GTEST_SKIP() << absent;
    }
    ASSERT_TRUE(backend.ok()) << backend.status();
    device_.emplace(*std::move(backend));
  }

  OperationResult OnDevice(const OperationSpec& spec, const fakes::SyntheticPrompt& prompt) {
    const DevicePrompt memory(prompt);
    OperationResult result;
    const absl::Status status = [&]() -> absl::Status {
      auto operation = device_->Begin(spec);
      if (!operation.ok()) return operation.status();
      if (absl::Status seen = (*operation)->ObserveLayers(memory.layers()); !seen.ok()) return seen;
      const auto finished = (*operation)->Finish();
      if (finished.ok()) result = **finished;
      return finished.status();
    }();
    EXPECT_TRUE(status.ok()) << status;
    if (!GetParam().window_kernels.empty()) {
      EXPECT_THAT(result.backend, ::testing::EndsWith("/cublas"));
    }
    return result;
  }
  OperationResult OnHost(const OperationSpec& spec, const fakes::SyntheticPrompt& prompt) {
    const absl::StatusOr<OperationResult> result = host_.Run(spec, prompt);
    EXPECT_TRUE(result.ok()) << result.status();
    return result.ok() ? *result : OperationResult();
  }

  Bench host_;
  std::optional<Bench> device_;
};

// Positions that one of two ascending sets holds.
Set Difference(const Set& a, const Set& b) {
  Set only;
  std::set_symmetric_difference(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(only));
  return only;
}

void ExpectOverlap(const std::vector<Set>& host, const std::vector<Set>& device) {
  ASSERT_EQ(host.size(), device.size());
  size_t kept = 0;
  size_t different = 0;
  for (size_t s = 0; s < host.size(); ++s) {
    kept += host[s].size();
    different += Difference(host[s], device[s]).size();
  }
  // Each position that is swapped for another counts twice in `different`.
  EXPECT_GE(1.0 - static_cast<double>(different) / 2.0 / static_cast<double>(kept), kLeastOverlap);
}

bool IsSigned(const Scores& scores) {
  return *std::min_element(scores.begin(), scores.end()) < 0.0;
}

// scores[s]: of the positions of set s in fp64; infinite where they are kept in any case.
void ExpectDifferencesAtTheCut(const std::vector<Set>& host, const std::vector<Set>& device,
                               const std::vector<Scores>& scores) {
  ASSERT_EQ(host.size(), scores.size());
  for (size_t s = 0; s < host.size(); ++s) {
    double cut = std::numeric_limits<double>::infinity();
    for (const int32_t t : host[s]) cut = std::min(cut, scores[s][t]);
    const double margin =
        kMargin * std::max(std::fabs(cut), IsSigned(scores[s]) ? kLeastScale : 0.0);
    for (const int32_t t : Difference(host[s], device[s])) {
      EXPECT_NEAR(scores[s][t], cut, margin) << "set " << s << " position " << t;
    }
    // The device's set is judged by the scores alone as well.
    double dropped = -std::numeric_limits<double>::infinity();
    for (size_t t = 0; t < scores[s].size(); ++t) {
      const bool is_kept =
          std::binary_search(device[s].begin(), device[s].end(), static_cast<int32_t>(t));
      if (is_kept) {
        EXPECT_GE(scores[s][t], cut - margin) << "set " << s << " position " << t;
      } else {
        dropped = std::max(dropped, scores[s][t]);
      }
    }
    const bool is_full = static_cast<int64_t>(device[s].size()) >= kBudget;
    if (is_full) {
      EXPECT_LE(dropped, cut + margin) << "set " << s;
    }
  }
}

// fp64 scores of the sets of the policy's own scope.
std::vector<Scores> OracleScores(const PolicyCase& policy, const fakes::SyntheticPrompt& prompt) {
  const fakes::PromptShape& shape = prompt.shape();
  std::vector<Scores> scores;
  if (policy.policy == "snapkv") {
    const int64_t kernel = policy.parameters.empty() ? 5 : 41;
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
      for (Scores& head : oracle::SnapKvScores(prompt, layer, kernel)) {
        std::fill(head.end() - shape.num_rows, head.end(), std::numeric_limits<double>::infinity());
        scores.push_back(std::move(head));
      }
    }
  } else if (policy.policy == "tova") {
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
      const oracle::Tile tile = oracle::Attention(prompt, layer, oracle::LastRows(prompt));
      Scores mean(shape.seq_len, 0.0);
      for (const auto& head : tile) {
        for (int64_t t = 0; t < shape.seq_len; ++t) mean[t] += head.back()[t];
      }
      mean.back() = std::numeric_limits<double>::infinity();
      scores.push_back(std::move(mean));
    }
  } else if (policy.name == "CompilerKv") {
    scores = oracle::CompilerKvScores(prompt, HeadWeights(prompt), 64).scores;
  } else if (policy.name == "CompilerKvOfLayers") {
    for (const Scores& layer :
         oracle::CompilerKvLayerAlphaScores(prompt, HeadWeights(prompt)).scores) {
      scores.push_back(oracle::AveragePool(layer, 3));
    }
  } else if (policy.policy == "knorm") {
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
      for (Scores& head : oracle::KnormScores(prompt, layer)) scores.push_back(std::move(head));
    }
  } else if (policy.name == "CompilerKvOfHeads") {
    scores = oracle::CompilerKvHeadAlphaScores(prompt, HeadWeights(prompt)).scores;
  } else if (policy.policy == "observation_heads") {
    // The table of MakeTableFor: dilated, so that runs of equal scores stand at the cut.
    engine::testing::Asked asked;
    asked.pool = 3;
    asked.sink = 0;
    using tables::ObservedRows;
    Scores merged = engine::testing::ObservationScores(prompt,
                                                       {{0, 1, ObservedRows::kLastRow, 0.5f},
                                                        {0, 1, ObservedRows::kMaxRows, 1.0f},
                                                        {1, 1, ObservedRows::kKeyNovelty, 0.25f},
                                                        {2, 3, ObservedRows::kMeanRows, 0.75f}},
                                                       asked);
    Scores dilated = merged;
    for (size_t t = 0; t < merged.size(); ++t) {
      for (size_t j = 0; j <= 2 && j <= t; ++j) dilated[t] = std::max(dilated[t], merged[t - j]);
    }
    scores.assign(shape.num_layers, dilated);
  }
  return scores;
}

fakes::PromptShape RandomShape(DType dtype, fakes::KvLayout layout, uint32_t seed) {
  fakes::PromptShape shape;
  shape.num_layers = 3;
  shape.seq_len = 291;  // no multiple of anything
  shape.dtype = dtype;
  shape.layout = layout;
  shape.seed = fakes::TestSeed(seed);
  return shape;
}

TEST_P(OperationParity, SetsDifferOnlyAtTheCut) {
  const std::tuple<DType, fakes::KvLayout, uint32_t> cases[] = {
      {DType::kBF16, fakes::KvLayout::kPaged, 11},
      {DType::kF16, fakes::KvLayout::kNhd, 12},
      {DType::kF32, fakes::KvLayout::kHnd, 13}};
  for (const auto& [dtype, layout, seed] : cases) {
    const fakes::SyntheticPrompt prompt(RandomShape(dtype, layout, seed));
    const OperationSpec spec = SpecOf(GetParam(), prompt);
    const std::vector<Set> host = SetsOf(OnHost(spec, prompt));
    const std::vector<Set> device = SetsOf(OnDevice(spec, prompt));
    ExpectOverlap(host, device);
    const std::vector<Scores> scores = OracleScores(GetParam(), prompt);
    ExpectDifferencesAtTheCut(host, device, scores);
  }
}

TEST_P(OperationParity, EveryScopeOverlaps) {
  const fakes::SyntheticPrompt prompt(RandomShape(DType::kBF16, fakes::KvLayout::kPaged, 5));
  for (const Scope scope :
       {Scope::kLayerElastic, Scope::kLayerEqual, Scope::kSequence, Scope::kKvHead}) {
    OperationSpec spec = SpecOf(GetParam(), prompt);
    spec.scope = scope;
    ExpectOverlap(SetsOf(OnHost(spec, prompt)), SetsOf(OnDevice(spec, prompt)));
  }
}

// One key everywhere, or two in turns where nothing is pooled: a pool adds the same values up in
// another order. Every score is one of two then, but for the rows that do not see the end.
TEST_P(OperationParity, PlantedTiesAreTheSameSets) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    fakes::SyntheticPrompt prompt(RandomShape(dtype, fakes::KvLayout::kPaged, 3));
    const fakes::PromptShape& shape = prompt.shape();
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
      for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
        for (int64_t t = 0; t < shape.seq_len; ++t) {
          const int64_t from = !GetParam().is_pooled && t * t % 7 % 3 == 1 ? 1 : 0;
          for (int64_t c = 0; c < shape.head_dim; ++c) {
            prompt.set_k(layer, head, t, c, static_cast<float>(prompt.k(layer, head, from, c)));
            prompt.set_v(layer, head, t, c, static_cast<float>(prompt.v(layer, head, from, c)));
          }
        }
      }
    }
    const OperationSpec spec = SpecOf(GetParam(), prompt);
    EXPECT_EQ(SetsOf(OnDevice(spec, prompt)), SetsOf(OnHost(spec, prompt)));
  }
}

// What is wrong with the second layer of three, alone and together.
TEST_P(OperationParity, BadLayerIsNamedAsOnTheHost) {
  const fakes::SyntheticPrompt good(RandomShape(DType::kBF16, fakes::KvLayout::kPaged, 3));
  fakes::SyntheticPrompt bad = good;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  bad.set_k(1, 1, 17, 2, nan);
  bad.set_v(1, 1, 17, 2, nan);
  bad.set_k(2, 0, 3, 2, nan);
  const OperationSpec spec = SpecOf(GetParam(), good);
  const absl::Status want = host_.Run(spec, bad).status();
  const DevicePrompt memory(bad);
  auto operation = device_->Begin(spec);
  ASSERT_TRUE(operation.ok()) << operation.status();
  EXPECT_EQ((*operation)->ObserveLayers(memory.layers()), want);
  EXPECT_EQ(want.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(want.message()), ::testing::StartsWith("layer 1: "));
}

INSTANTIATE_TEST_SUITE_P(EveryPolicy, OperationParity, ::testing::ValuesIn(Policies()),
                         [](const auto& info) { return info.param.TestName(); });

}  // namespace
}  // namespace keepset::kernels
