// What the tests of policy compilerkv share.
#ifndef KEEPSET_TESTS_ENGINE_COMPILERKV_TEST_SUPPORT_H_
#define KEEPSET_TESTS_ENGINE_COMPILERKV_TEST_SUPPORT_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/engine/run_operation.h"

namespace keepset::engine::testing {

// One prompt with a table whose head weights and gates differ per head and layer.
struct CompilerKvSample {
  fakes::SyntheticPrompt prompt{fakes::PromptShape{}};
  fakes::TableSample table;
  OperationSpec spec;

  CompilerKvSample() {
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

// The keep sets of all layers, one after the other.
inline std::vector<std::vector<int32_t>> Sets(const OperationResult& result) {
  std::vector<std::vector<int32_t>> sets;
  for (const LayerResult& layer : result.layers) {
    sets.insert(sets.end(), layer.keep_indices.begin(), layer.keep_indices.end());
  }
  return sets;
}

}  // namespace keepset::engine::testing

#endif  // KEEPSET_TESTS_ENGINE_COMPILERKV_TEST_SUPPORT_H_
