// What an operation is said to take of device memory, and what it takes: it runs in exactly so many
// bytes, and not in one piece less.
#include "engine/device_bytes.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "kernels/cuda/region_pieces.h"
#include "kernels/writable_view.h"
#include "tests/engine/run_operation.h"
#include "tests/kernels/cuda/cublas_fixture.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/device_prompt.h"
#include "tests/kernels/cuda/emulated_runtime.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

namespace {

using engine::Handover;
using engine::RowMove;
using engine::Scope;
using fakes::KvLayout;

constexpr int64_t kPlenty = int64_t{12} << 20;
constexpr int64_t kPiece = cuda::RegionPieces::kAlignment;
constexpr int64_t kBudget = 40;

enum class Observed { kQueries, kQueriesWithLse, kTile, kColumns };

struct PolicyCase {
  std::string policy;
  std::map<std::string, std::string> parameters = {};
};

constexpr fakes::PromptShape Shape(KvLayout layout, DType dtype, int64_t num_kv_heads,
                                   int64_t seq_len) {
  fakes::PromptShape shape;
  shape.num_qo_heads = 2 * num_kv_heads;
  shape.num_kv_heads = num_kv_heads;
  shape.seq_len = seq_len;
  shape.dtype = dtype;
  shape.layout = layout;
  return shape;
}

constexpr fakes::PromptShape kPagedBf16 = Shape(KvLayout::kPaged, DType::kBF16, 2, 119);

// Operations whose inputs and destinations all lie in device memory.
class Workload {
 public:
  Workload(const fakes::PromptShape& shape, Observed observed)
      : prompt_(shape), memory_(prompt_), layers_(memory_.layers()) {
    for (engine::ObservedLayer& layer : layers_) Observe(observed, layer);
  }

  engine::OperationSpec Spec(const PolicyCase& policy, std::optional<Scope> scope = {}) const {
    engine::OperationSpec spec = prompt_.spec();
    spec.policy = policy.policy;
    spec.parameters = policy.parameters;
    spec.scope = scope;
    spec.budget.kind = engine::Budget::Kind::kTokens;
    spec.budget.tokens = kBudget;
    spec.ppl = 10.0;
    spec.table = fakes::MakeTableFor(policy.policy, prompt_.model());
    return spec;
  }
  engine::DeviceBytesOptions Options(Handover handover, RowMove move) const {
    return {layers_.front().observation, handover, move};
  }

  // Whether rows were left out.
  absl::StatusOr<engine::Outcome> Run(engine::Bench& bench, const engine::OperationSpec& spec,
                                      RowMove move, Handover handover) const {
    auto operation = bench.Begin(spec);
    if (!operation.ok()) return operation.status();
    const size_t at_once = handover == Handover::kTogether ? layers_.size() : 1;
    for (size_t i = 0; i < layers_.size(); i += at_once) {
      const absl::Status seen =
          (*operation)->ObserveLayers(absl::MakeConstSpan(layers_).subspan(i, at_once));
      if (!seen.ok()) return seen;
    }
    const auto finished = (*operation)->Finish();
    if (!finished.ok()) return finished.status();
    if (absl::Status moved = Move(**operation, move, at_once); !moved.ok()) return moved;
    return (*finished)->outcome;
  }

 private:
  static const std::byte* Add(const std::vector<float>& values,
                              std::vector<std::unique_ptr<DeviceBytes>>& kept) {
    const auto* const bytes = reinterpret_cast<const std::byte*>(values.data());
    kept.push_back(std::make_unique<DeviceBytes>(
        std::vector<std::byte>(bytes, bytes + values.size() * sizeof(float))));
    return kept.back()->data();
  }

  void Observe(Observed observed, engine::ObservedLayer& layer) {
    const fakes::PromptShape& shape = prompt_.shape();
    engine::LayerObservation& to = layer.observation;
    if (observed == Observed::kQueriesWithLse) {
      const std::vector<float> lse = prompt_.window_lse(layer.layer);
      to.window_lse = prompt_.observation(layer.layer, lse).window_lse;
      to.window_lse.data = Add(lse, extra_);
    }
    const auto even = [&](int64_t rows) {
      return std::vector<float>(static_cast<size_t>(shape.num_qo_heads * rows * shape.seq_len),
                                1.0f / static_cast<float>(shape.seq_len));
    };
    if (observed == Observed::kTile) {
      TileView& tile = to.attn_tile;
      tile.data = Add(even(shape.num_rows), extra_);
      tile.num_qo_heads = shape.num_qo_heads;
      tile.num_rows = shape.num_rows;
      tile.seq_len = shape.seq_len;
      tile.row_stride = shape.seq_len;
      tile.head_stride = shape.num_rows * shape.seq_len;
      tile.size_bytes = tile.num_qo_heads * tile.head_stride * int64_t{sizeof(float)};
      to.q_window = {};
    }
    if (observed == Observed::kColumns) {
      ColumnsView& columns = to.column_stats;
      columns.data = Add(even(1), extra_);
      columns.num_qo_heads = shape.num_qo_heads;
      columns.seq_len = shape.seq_len;
      columns.head_stride = shape.seq_len;
      columns.size_bytes = columns.num_qo_heads * columns.head_stride * int64_t{sizeof(float)};
      to.q_window = {};
    }
  }

  absl::Status Move(engine::Operation& operation, RowMove move, size_t at_once) const {
    if (move == RowMove::kNone) return absl::OkStatus();
    // Copies, so that what one operation moves another finds where it was.
    std::vector<std::unique_ptr<DeviceBytes>> copies;
    std::vector<engine::LayerGather> gathers;
    for (const engine::ObservedLayer& layer : layers_) {
      const auto copy = [&](const KvView& view) {
        copies.push_back(std::make_unique<DeviceBytes>(
            std::vector<std::byte>(view.data, view.data + view.size_bytes)));
        return WritableLike(view, copies.back()->data());
      };
      const KvView& k = layer.observation.k;
      const KvView& v = layer.observation.v;
      gathers.push_back({layer.layer, k, v, copy(k), copy(v)});
    }
    if (move == RowMove::kGather) {
      for (size_t i = 0; i < gathers.size(); i += at_once) {
        const absl::Status moved =
            operation.GatherLayers(absl::MakeConstSpan(gathers).subspan(i, at_once));
        if (!moved.ok()) return moved;
      }
      return absl::OkStatus();
    }
    std::vector<engine::LayerInPlace> moves;
    for (const engine::LayerGather& one : gathers) {
      moves.push_back({one.layer, one.out_k, one.out_v});
    }
    if (absl::Status reserved = operation.ReserveInPlace(moves); !reserved.ok()) return reserved;
    for (const engine::LayerInPlace& one : moves) {
      const absl::Status moved = operation.GatherInPlace(one.layer, one.k, one.v);
      if (!moved.ok()) return moved;
    }
    return absl::OkStatus();
  }

  fakes::SyntheticPrompt prompt_;
  DevicePrompt memory_;
  std::vector<engine::ObservedLayer> layers_;
  std::vector<std::unique_ptr<DeviceBytes>> extra_;
};

// A backend of kPlenty, of which an operation finds as much as a test leaves it.
class Memory {
 public:
  explicit Memory(BackendOptions options = {}) : bench_(New(std::move(options))) {}

  engine::Bench& bench() { return bench_; }
  absl::StatusOr<int64_t> Said(const engine::OperationSpec& spec,
                               const engine::DeviceBytesOptions& options) {
    return engine::DeviceBytes(spec, options, bench_.policies(), bench_.backend());
  }
  // With `bytes` of memory, in one piece.
  absl::StatusOr<engine::Outcome> RunIn(int64_t bytes, const Workload& workload,
                                        const engine::OperationSpec& spec, RowMove move,
                                        Handover handover) {
    const auto others = bench_.backend().NewBuffer(1, (kPlenty - bytes) / int64_t{sizeof(float)});
    EXPECT_TRUE(others.ok()) << others.status();
    return workload.Run(bench_, spec, move, handover);
  }

 private:
  static std::unique_ptr<ComputeBackend> New(BackendOptions options) {
    options.device_memory_bytes = kPlenty;
    return *NewCudaBackend(options);
  }

  engine::Bench bench_;
};

// So many bytes serve, and a piece less does not.
void ExpectExact(Memory& memory, const Workload& workload, const engine::OperationSpec& spec,
                 RowMove move) {
  for (const Handover handover : {Handover::kTogether, Handover::kOneByOne}) {
    const absl::StatusOr<int64_t> said = memory.Said(spec, workload.Options(handover, move));
    ASSERT_TRUE(said.ok()) << said.status();
    const cuda::EmulatedCounts begin = cuda::CountsSoFar();
    const absl::Status enough = memory.RunIn(*said, workload, spec, move, handover).status();
    EXPECT_TRUE(enough.ok()) << *said << " bytes: " << enough;
    if (*said == 0) continue;
    const cuda::EmulatedCounts middle = cuda::CountsSoFar();
    const absl::Status less = memory.RunIn(*said - kPiece, workload, spec, move, handover).status();
    const cuda::EmulatedCounts end = cuda::CountsSoFar();
    if (handover == Handover::kTogether && less.ok()) {
      // Not as one would have it: layers went one by one.
      EXPECT_GT(end.waits - middle.waits, middle.waits - begin.waits) << *said - kPiece << " bytes";
    } else {
      EXPECT_EQ(less.code(), absl::StatusCode::kResourceExhausted)
          << *said - kPiece << " bytes: " << less;
    }
  }
}

std::vector<PolicyCase> Policies() {
  return {{"snapkv"},
          {"snapkv", {{"kernel_size", "41"}}},
          {"tova"},
          {"knorm"},
          {"compilerkv"},
          {"compilerkv", {{"alpha_scope", "layer"}, {"pool_kernel", "3"}}},
          {"compilerkv", {{"alpha_scope", "head"}}},
          {"observation_heads"},
          {"streaming_llm"},
          {"random"},
          {"full"}};
}

void ExpectExactForEveryPolicy(const Workload& workload, std::optional<Scope> scope, RowMove move) {
  Memory memory;
  for (const PolicyCase& policy : Policies()) {
    SCOPED_TRACE(absl::StrCat(policy.policy, " with ", policy.parameters.size(), " parameters"));
    ExpectExact(memory, workload, workload.Spec(policy, scope), move);
  }
}

class DeviceBytesOfScope : public ::testing::TestWithParam<Scope> {};

TEST_P(DeviceBytesOfScope, AreExactForEveryPolicy) {
  ExpectExactForEveryPolicy(Workload(kPagedBf16, Observed::kQueries), GetParam(), RowMove::kNone);
}

INSTANTIATE_TEST_SUITE_P(EveryScope, DeviceBytesOfScope,
                         ::testing::Values(Scope::kLayerElastic, Scope::kLayerEqual,
                                           Scope::kSequence, Scope::kKvHead),
                         [](const auto& info) {
                           return absl::StrCat("Scope", static_cast<int>(info.param));
                         });

TEST(DeviceBytes, AreExactForPagesAndAGather) {
  ExpectExactForEveryPolicy(Workload(kPagedBf16, Observed::kQueries), std::nullopt,
                            RowMove::kGather);
}

TEST(DeviceBytes, AreExactForALogSumExpAndAGatherInPlace) {
  ExpectExactForEveryPolicy(
      Workload(Shape(KvLayout::kNhd, DType::kF16, 4, 77), Observed::kQueriesWithLse), std::nullopt,
      RowMove::kInPlace);
}

TEST(DeviceBytes, AreExactForFp32) {
  ExpectExactForEveryPolicy(
      Workload(Shape(KvLayout::kHnd, DType::kF32, 2, 101), Observed::kQueries), Scope::kKvHead,
      RowMove::kGather);
}

TEST(DeviceBytes, AreExactForTiles) {
  Memory memory;
  const Workload workload(Shape(KvLayout::kNhd, DType::kBF16, 2, 119), Observed::kTile);
  for (const char* policy : {"snapkv", "tova", "compilerkv", "observation_heads"}) {
    SCOPED_TRACE(policy);
    ExpectExact(memory, workload, workload.Spec({policy}), RowMove::kInPlace);
  }
}

TEST(DeviceBytes, AreExactForColumnStatistics) {
  Memory memory;
  const Workload workload(kPagedBf16, Observed::kColumns);
  for (const char* policy : {"snapkv", "compilerkv"}) {
    SCOPED_TRACE(policy);
    ExpectExact(memory, workload, workload.Spec({policy}), RowMove::kGather);
  }
}

TEST(DeviceBytes, AreExactForHopperKernels) {
  cuda::SetEmulatedDevice(cuda::EmulatedDevice::kSm90);
  {
    Memory memory({.window_kernels = "hopper"});
    fakes::PromptShape shape = kPagedBf16;
    shape.head_dim = 64;
    for (const Observed observed : {Observed::kQueries, Observed::kQueriesWithLse}) {
      const Workload workload(shape, observed);
      ExpectExact(memory, workload, workload.Spec({"snapkv"}), RowMove::kGather);
      ExpectExact(memory, workload, workload.Spec({"compilerkv"}), RowMove::kInPlace);
    }
  }
  cuda::SetEmulatedDevice(cuda::EmulatedDevice::kSm86);
}

TEST(DeviceBytes, AreExactForProductsByCublas) {
  Memory memory(CublasOptions());
  for (const KvLayout layout : {KvLayout::kPaged, KvLayout::kNhd}) {
    const Workload workload(Shape(layout, DType::kBF16, 2, 119), Observed::kQueries);
    ExpectExact(memory, workload, workload.Spec({"snapkv"}), RowMove::kGather);
  }
}

// Block tables and keep sets of all layers outgrow the memory that uploads begin with.
TEST(DeviceBytes, AreExactWhereUploadsGrow) {
  Memory memory;
  fakes::PromptShape shape = Shape(KvLayout::kPaged, DType::kBF16, 1, 16000);
  shape.num_layers = 5;
  shape.head_dim = 8;
  const Workload workload(shape, Observed::kQueries);
  engine::OperationSpec spec = workload.Spec({"streaming_llm"});
  spec.budget.tokens = 15000;
  ExpectExact(memory, workload, spec, RowMove::kGather);
}

TEST(DeviceBytes, OfASpecAloneServeEveryInput) {
  Memory memory;
  for (const KvLayout layout : {KvLayout::kPaged, KvLayout::kNhd, KvLayout::kHnd}) {
    for (const Observed observed :
         {Observed::kQueries, Observed::kQueriesWithLse, Observed::kTile, Observed::kColumns}) {
      const Workload workload(Shape(layout, DType::kBF16, 2, 119), observed);
      const engine::OperationSpec spec = workload.Spec({"compilerkv"});
      const absl::StatusOr<int64_t> said = memory.Said(spec, {});
      ASSERT_TRUE(said.ok()) << said.status();
      const absl::Status enough =
          memory.RunIn(*said, workload, spec, RowMove::kGather, Handover::kTogether).status();
      EXPECT_TRUE(enough.ok()) << *said << " bytes: " << enough;
    }
  }
}

TEST(DeviceBytes, CountAShadowTable) {
  Memory memory;
  const Workload workload(kPagedBf16, Observed::kQueries);
  engine::OperationSpec spec = workload.Spec({"compilerkv"});
  const absl::StatusOr<int64_t> alone = memory.Said(spec, {});
  ASSERT_TRUE(alone.ok()) << alone.status();
  spec.shadow_table = spec.table;
  const absl::StatusOr<int64_t> both = memory.Said(spec, {});
  ASSERT_TRUE(both.ok()) << both.status();
  EXPECT_GT(*both, *alone);
}

TEST(DeviceBytes, TooFewKeepEverythingWhereThatIsAskedFor) {
  Memory memory;
  const Workload workload(kPagedBf16, Observed::kQueries);
  engine::OperationSpec spec = workload.Spec({"snapkv"});
  const absl::StatusOr<int64_t> said =
      memory.Said(spec, workload.Options(Handover::kOneByOne, RowMove::kNone));
  ASSERT_TRUE(said.ok()) << said.status();
  spec.on_short_memory = engine::OnShortMemory::kKeepFull;
  const auto short_of_it =
      memory.RunIn(*said - kPiece, workload, spec, RowMove::kNone, Handover::kOneByOne);
  ASSERT_TRUE(short_of_it.ok()) << short_of_it.status();
  EXPECT_EQ(*short_of_it, engine::Outcome::kKeptFull);
  const auto enough = memory.RunIn(*said, workload, spec, RowMove::kNone, Handover::kOneByOne);
  ASSERT_TRUE(enough.ok()) << enough.status();
  EXPECT_EQ(*enough, engine::Outcome::kCompressed);
}

TEST(DeviceBytes, AreSaidWithoutTheDevice) {
  Memory memory;
  const Workload workload(kPagedBf16, Observed::kQueries);
  const cuda::EmulatedCounts before = cuda::CountsSoFar();
  for (const PolicyCase& policy : Policies()) {
    EXPECT_TRUE(memory.Said(workload.Spec(policy), {}).ok()) << policy.policy;
  }
  const cuda::EmulatedCounts after = cuda::CountsSoFar();
  EXPECT_EQ(after.launches, before.launches);
  EXPECT_EQ(after.waits, before.waits);
  EXPECT_EQ(after.allocations, before.allocations);
  EXPECT_EQ(after.host_allocations, before.host_allocations);
  EXPECT_EQ(memory.bench().backend().MemoryUse().peak_bytes, 0);
}

TEST(DeviceBytes, RefuseWhatTheOperationRefuses) {
  Memory memory;
  const Workload workload(kPagedBf16, Observed::kQueries);
  engine::OperationSpec spec = workload.Spec({"snapkv"});
  spec.num_rows = 0;
  const absl::Status refused = memory.Said(spec, {}).status();
  EXPECT_EQ(refused, memory.bench().Begin(spec).status());
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
}

TEST(DeviceBytes, AreNoneInHostMemory) {
  engine::Bench bench;
  const fakes::SyntheticPrompt prompt({});
  EXPECT_EQ(*engine::DeviceBytes(prompt.spec(), {}, bench.policies(), bench.backend()), 0);
}

}  // namespace
}  // namespace keepset::kernels
