// How often the host launches and waits in one operation: by count, on the emulator.
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/engine/run_operation.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/device_prompt.h"
#include "tests/kernels/cuda/emulated_runtime.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

namespace {

using cuda::EmulatedCounts;
using engine::LayerGather;
using engine::Operation;

constexpr int64_t kBudget = 20;

class EmulatedOperation : public ::testing::Test {
 protected:
  static fakes::SyntheticPrompt Prompt(int64_t num_layers) {
    fakes::PromptShape shape;
    shape.num_layers = num_layers;
    shape.dtype = DType::kBF16;
    shape.layout = fakes::KvLayout::kPaged;
    return fakes::SyntheticPrompt(shape);
  }

  // table: null for one of the policy's own.
  std::unique_ptr<Operation> Begin(const std::string& policy, const fakes::SyntheticPrompt& prompt,
                                   std::shared_ptr<const tables::DecisionTable> table = nullptr) {
    engine::OperationSpec spec = prompt.spec();
    spec.policy = policy;
    spec.budget.kind = engine::Budget::Kind::kTokens;
    spec.budget.tokens = kBudget;
    spec.ppl = 10.0;
    spec.table = table != nullptr ? std::move(table) : fakes::MakeTableFor(policy, prompt.model());
    auto operation = bench_.Begin(spec);
    EXPECT_TRUE(operation.ok()) << operation.status();
    return *std::move(operation);
  }

  template <typename Work>
  static EmulatedCounts Counted(Work work) {
    const EmulatedCounts before = cuda::CountsSoFar();
    work();
    const EmulatedCounts after = cuda::CountsSoFar();
    return {after.launches - before.launches, after.waits - before.waits};
  }

  // All layers at once, then Finish.
  EmulatedCounts CountTogether(const std::string& policy, int64_t num_layers) {
    const fakes::SyntheticPrompt prompt = Prompt(num_layers);
    const DevicePrompt memory(prompt);
    const std::unique_ptr<Operation> operation = Begin(policy, prompt);
    return Counted([&] {
      EXPECT_TRUE(operation->ObserveLayers(memory.layers()).ok());
      EXPECT_TRUE(operation->Finish().ok());
    });
  }

  engine::Bench bench_{*NewCudaBackend({})};
};

TEST_F(EmulatedOperation, WaitsDoNotGrowWithTheLayers) {
  // The scores of all layers, and their cuts.
  for (const char* policy : {"snapkv", "tova", "knorm"}) {
    EXPECT_EQ(CountTogether(policy, 3).waits, 2) << policy;
    EXPECT_EQ(CountTogether(policy, 7).waits, 2) << policy;
  }
  // The mass of all layers, and the end of the scores, are two more.
  EXPECT_EQ(CountTogether("compilerkv", 3).waits, 4);
  EXPECT_EQ(CountTogether("compilerkv", 7).waits, 4);
  EXPECT_EQ(CountTogether("observation_heads", 3).waits, 3);
  EXPECT_EQ(CountTogether("observation_heads", 7).waits, 3);
}

// One wait for what both tables need, then for each its scores, masses and the end.
TEST_F(EmulatedOperation, AShadowTableSharesTheObservation) {
  enum class Shadow { kNone, kAttached };
  const auto counted = [&](int64_t num_layers, Shadow shadow) {
    const fakes::SyntheticPrompt prompt = Prompt(num_layers);
    const DevicePrompt memory(prompt);
    engine::OperationSpec spec = prompt.spec();
    spec.policy = "compilerkv";
    spec.budget.kind = engine::Budget::Kind::kTokens;
    spec.budget.tokens = kBudget;
    spec.ppl = 10.0;
    spec.table = fakes::MakeTableFor("compilerkv", prompt.model());
    if (shadow == Shadow::kAttached) spec.shadow_table = spec.table;
    const auto operation = bench_.Begin(spec);
    EXPECT_TRUE(operation.ok()) << operation.status();
    return Counted([&] { EXPECT_TRUE((*operation)->ObserveLayers(memory.layers()).ok()); });
  };
  EXPECT_EQ(counted(7, Shadow::kAttached).waits, counted(3, Shadow::kAttached).waits);
  EXPECT_EQ(counted(7, Shadow::kAttached).waits, counted(7, Shadow::kNone).waits + 1);
  // The merge of the heads' scores of each layer is the shadow's own.
  EXPECT_LE(counted(7, Shadow::kAttached).launches, counted(7, Shadow::kNone).launches + 7);
}

TEST_F(EmulatedOperation, OneByOneEveryLayerIsWaitedFor) {
  const fakes::SyntheticPrompt prompt = Prompt(7);
  const DevicePrompt memory(prompt);
  const std::unique_ptr<Operation> operation = Begin("tova", prompt);
  const EmulatedCounts counts = Counted([&] {
    for (const engine::ObservedLayer& layer : memory.layers()) {
      EXPECT_TRUE(operation->Observe(layer.layer, layer.observation).ok());
    }
    EXPECT_TRUE(operation->Finish().ok());
  });
  EXPECT_EQ(counts.waits, 14);
}

// A given log-sum-exp: one launch for the rows and one for the columns of all layers.
TEST_F(EmulatedOperation, WindowScoresOfAllLayersShareLaunches) {
  constexpr int64_t kLayers = 7;
  const fakes::SyntheticPrompt prompt = Prompt(kLayers);
  const DevicePrompt memory(prompt);
  // Above the logits.
  const std::vector<float> given(4 * 8, 12.0f);
  const auto* const bytes = reinterpret_cast<const std::byte*>(given.data());
  const DeviceBytes lse(std::vector<std::byte>(bytes, bytes + given.size() * sizeof(float)));
  std::vector<engine::ObservedLayer> layers = memory.layers();
  for (engine::ObservedLayer& layer : layers) {
    LseView& view = layer.observation.window_lse;
    view.data = lse.data();
    view.size_bytes = static_cast<int64_t>(given.size() * sizeof(float));
    view.num_qo_heads = 4;
    view.num_rows = 8;
    view.head_stride = 8;
  }
  const std::unique_ptr<Operation> operation = Begin("tova", prompt);
  const EmulatedCounts counts = Counted([&] {
    const absl::Status status = operation->ObserveLayers(layers);
    EXPECT_TRUE(status.ok()) << status;
  });
  // Rows, columns, the merge of each layer's heads, and the cuts.
  EXPECT_EQ(counts.launches, 2 + kLayers + 1);
}

// The views of a layer end with Observe, at whatever launch of whatever op it is refused: work that
// is still queued when the operation ends would read memory that is gone.
TEST_F(EmulatedOperation, RefusedLayerIsNotReadAfterwards) {
  using tables::ObservedRows;
  const fakes::SyntheticPrompt prompt = Prompt(2);
  const auto table = fakes::MakeObservationHeads(
      prompt.model(),
      {{0, 1, ObservedRows::kLastRow, 0.5f}, {0, 1, ObservedRows::kKeyNovelty, 0.25f}}, {});
  const auto observe = [&] {
    const std::unique_ptr<Operation> operation = Begin("observation_heads", prompt, table);
    auto memory = std::make_unique<DevicePrompt>(prompt);
    const absl::Status status = operation->Observe(0, memory->layer(0).observation);
    memory.reset();
    return status;
  };
  const int64_t launches = Counted([&] { EXPECT_TRUE(observe().ok()); }).launches;
  for (int64_t launch = 0; launch < launches; ++launch) {
    cuda::FailLaunchAfter(launch, cudaErrorInvalidConfiguration);
    EXPECT_FALSE(observe().ok()) << "launch " << launch;
  }
}

// An error of queued work, found by the wait of one operation while another one runs. In a process
// of its own: the emulated device stays faulted as a real one does.
TEST_F(EmulatedOperation, StickyFaultEndsEveryRunningOperationAsKeptFull) {
  EXPECT_EXIT(
      {
        const fakes::SyntheticPrompt prompt = Prompt(4);
        const DevicePrompt memory(prompt);
        const std::vector<engine::ObservedLayer> layers = memory.layers();
        std::vector<std::unique_ptr<Operation>> operations;
        for (const char* policy : {"snapkv", "compilerkv", "tova"}) {
          operations.push_back(Begin(policy, prompt));
          if (!operations.back()->Observe(0, layers[0].observation).ok()) std::exit(1);
        }
        cuda::FailNextWait(cudaErrorIllegalAddress);
        const auto rest = absl::MakeConstSpan(layers).subspan(1);
        for (const auto& operation : operations) {
          if (!operation->ObserveLayers(rest).ok()) std::exit(2);
          const auto result = operation->Finish();
          if (!result.ok()) std::exit(3);
          if ((*result)->outcome != engine::Outcome::kKeptFull) std::exit(4);
          if ((*result)->reason != engine::Reason::kDeviceFault) std::exit(5);
        }
        const auto next = bench_.Begin(operations[0]->spec());
        std::exit(next.status().code() == absl::StatusCode::kUnavailable ? 0 : 6);
      },
      ::testing::ExitedWithCode(0), "");
}

TEST_F(EmulatedOperation, GatherOfAllLayersIsOneLaunchAndOneWait) {
  constexpr int64_t kLayers = 5;
  const fakes::SyntheticPrompt prompt = Prompt(kLayers);
  const DevicePrompt memory(prompt);
  const std::unique_ptr<Operation> operation = Begin("snapkv", prompt);
  ASSERT_TRUE(operation->ObserveLayers(memory.layers()).ok());
  ASSERT_TRUE(operation->Finish().ok());
  const int64_t tensor_bytes = 2 * kBudget * 16 * DTypeBytes(DType::kBF16);
  const DeviceBytes out(std::vector<std::byte>(static_cast<size_t>(2 * kLayers * tensor_bytes)));
  std::vector<LayerGather> gathers;
  for (const engine::ObservedLayer& layer : memory.layers()) {
    LayerGather& gather = gathers.emplace_back();
    gather.layer = layer.layer;
    gather.k = layer.observation.k;
    gather.v = layer.observation.v;
    MutableKvView to;
    to.size_bytes = tensor_bytes;
    to.dtype = DType::kBF16;
    to.num_kv_heads = 2;
    to.seq_len = kBudget;
    to.head_dim = 16;
    to.head_stride = kBudget * 16;
    to.token_stride = 16;
    gather.out_k = gather.out_v = to;
    gather.out_k.data = out.data() + 2 * layer.layer * tensor_bytes;
    gather.out_v.data = gather.out_k.data + tensor_bytes;
  }
  const EmulatedCounts counts = Counted([&] {
    const absl::Status status = operation->GatherLayers(gathers);
    EXPECT_TRUE(status.ok()) << status;
  });
  EXPECT_EQ(counts.launches, 1);
  EXPECT_EQ(counts.waits, 1);
}

}  // namespace
}  // namespace keepset::kernels
