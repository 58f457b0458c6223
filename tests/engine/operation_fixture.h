// One operation of a small synthetic prompt, step by step.
#ifndef KEEPSET_TESTS_ENGINE_OPERATION_FIXTURE_H_
#define KEEPSET_TESTS_ENGINE_OPERATION_FIXTURE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "engine/operation.h"
#include "gtest/gtest.h"
#include "tests/engine/run_operation.h"
#include "tests/fakes/synthetic_prompt.h"

namespace keepset::engine {

class OperationTest : public ::testing::Test {
 protected:
  OperationSpec Spec(const std::string& policy, int64_t budget) const {
    OperationSpec spec = prompt_.spec();
    spec.policy = policy;
    spec.budget.kind = Budget::Kind::kTokens;
    spec.budget.tokens = budget;
    return spec;
  }

  std::unique_ptr<Operation> Begin(const OperationSpec& spec) {
    auto operation = bench_.Begin(spec);
    EXPECT_TRUE(operation.ok()) << operation.status();
    return *std::move(operation);
  }

  absl::Status Observe(Operation& operation, int64_t layer) {
    return operation.Observe(layer, prompt_.observation(layer));
  }

  std::unique_ptr<Operation> Observed(const OperationSpec& spec) {
    std::unique_ptr<Operation> operation = Begin(spec);
    for (int64_t layer = 0; layer < spec.model.num_layers; ++layer) {
      EXPECT_TRUE(Observe(*operation, layer).ok());
    }
    return operation;
  }

  Bench bench_;
  fakes::SyntheticPrompt prompt_{fakes::PromptShape{}};
};

}  // namespace keepset::engine

#endif  // KEEPSET_TESTS_ENGINE_OPERATION_FIXTURE_H_
