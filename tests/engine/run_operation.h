// Whole operations in one call, on the CPU backend unless the test brings another.
#ifndef KEEPSET_TESTS_ENGINE_RUN_OPERATION_H_
#define KEEPSET_TESTS_ENGINE_RUN_OPERATION_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/operation.h"
#include "kernels/backend_registry.h"
#include "tests/fakes/fake_clock.h"
#include "tests/fakes/gated_backend.h"
#include "tests/fakes/synthetic_prompt.h"

namespace keepset::engine {

// One backend, the built-in policies, a clock that stands still.
class Bench {
 public:
  explicit Bench(int num_threads = 1);
  // The same with a registry or backend of the test's own.
  explicit Bench(std::unique_ptr<PolicyRegistry> policies);
  explicit Bench(std::unique_ptr<kernels::ComputeBackend> backend);

  kernels::ComputeBackend& backend() { return *backend_; }
  const PolicyRegistry& policies() const { return *policies_; }
  fakes::FakeClock& clock() { return clock_; }

  absl::StatusOr<std::unique_ptr<Operation>> Begin(const OperationSpec& spec);
  // Begin, every layer of `prompt`, Finish.
  absl::StatusOr<OperationResult> Run(const OperationSpec& spec,
                                      const fakes::SyntheticPrompt& prompt);
  // The same with all layers handed over at once.
  absl::StatusOr<OperationResult> RunTogether(const OperationSpec& spec,
                                              const fakes::SyntheticPrompt& prompt);
  // Run without observations.
  absl::StatusOr<OperationResult> Run(const OperationSpec& spec);

 private:
  std::unique_ptr<kernels::ComputeBackend> backend_;
  std::unique_ptr<PolicyRegistry> policies_;
  fakes::FakeClock clock_;
};

// The CPU backend, which takes so many layers together.
std::unique_ptr<kernels::ComputeBackend> NewCpuBackendOfManyLayers(fakes::Gate& gate,
                                                                   int64_t layers_at_once);

// A spec of `policy` with a budget in tokens, for a model without tensors.
OperationSpec TensorlessSpec(const std::string& policy, int64_t num_layers, int64_t seq_len,
                             int64_t budget_tokens);

}  // namespace keepset::engine

#endif  // KEEPSET_TESTS_ENGINE_RUN_OPERATION_H_
