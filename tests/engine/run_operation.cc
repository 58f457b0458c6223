#include "tests/engine/run_operation.h"

#include <string>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"

namespace keepset::engine {
namespace {

std::unique_ptr<kernels::ComputeBackend> NewCpu(int num_threads) {
  kernels::BackendOptions options;
  options.num_threads = num_threads;
  auto backend = kernels::NewBackend("cpu", options);
  KEEPSET_CHECK(backend.ok());
  return *std::move(backend);
}

}  // namespace

Bench::Bench(int num_threads)
    : backend_(NewCpu(num_threads)), policies_(NewBuiltinPolicyRegistry()) {}

Bench::Bench(std::unique_ptr<PolicyRegistry> policies)
    : backend_(NewCpu(1)), policies_(std::move(policies)) {}

Bench::Bench(std::unique_ptr<kernels::ComputeBackend> backend)
    : backend_(std::move(backend)), policies_(NewBuiltinPolicyRegistry()) {}

absl::StatusOr<std::unique_ptr<Operation>> Bench::Begin(const OperationSpec& spec) {
  return Operation::Begin(spec, *policies_, *backend_, clock_);
}

absl::StatusOr<OperationResult> Bench::Run(const OperationSpec& spec,
                                           const fakes::SyntheticPrompt& prompt) {
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<Operation> operation, Begin(spec));
  for (int64_t layer = 0; layer < spec.model.num_layers; ++layer) {
    KEEPSET_RETURN_IF_ERROR(operation->Observe(layer, prompt.observation(layer)));
  }
  KEEPSET_ASSIGN_OR_RETURN(const OperationResult* const result, operation->Finish());
  return *result;
}

absl::StatusOr<OperationResult> Bench::RunTogether(const OperationSpec& spec,
                                                   const fakes::SyntheticPrompt& prompt) {
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<Operation> operation, Begin(spec));
  std::vector<ObservedLayer> layers;
  for (int64_t layer = 0; layer < spec.model.num_layers; ++layer) {
    layers.push_back({layer, prompt.observation(layer)});
  }
  KEEPSET_RETURN_IF_ERROR(operation->ObserveLayers(layers));
  KEEPSET_ASSIGN_OR_RETURN(const OperationResult* const result, operation->Finish());
  return *result;
}

absl::StatusOr<OperationResult> Bench::Run(const OperationSpec& spec) {
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<Operation> operation, Begin(spec));
  for (int64_t layer = 0; layer < spec.model.num_layers; ++layer) {
    KEEPSET_RETURN_IF_ERROR(operation->Observe(layer, {}));
  }
  KEEPSET_ASSIGN_OR_RETURN(const OperationResult* const result, operation->Finish());
  return *result;
}

std::unique_ptr<kernels::ComputeBackend> NewCpuBackendOfManyLayers(fakes::Gate& gate,
                                                                   int64_t layers_at_once) {
  return std::make_unique<fakes::GatedBackend>(NewCpu(1), gate, layers_at_once);
}

OperationSpec TensorlessSpec(const std::string& policy, int64_t num_layers, int64_t seq_len,
                             int64_t budget_tokens) {
  OperationSpec spec;
  spec.model.num_layers = num_layers;
  spec.model.num_qo_heads = 4;
  spec.model.num_kv_heads = 2;
  spec.model.head_dim = 8;
  spec.seq_len = seq_len;
  spec.policy = policy;
  spec.budget.kind = Budget::Kind::kTokens;
  spec.budget.tokens = budget_tokens;
  return spec;
}

}  // namespace keepset::engine
