// Operations in device memory of a fixed size.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "kernels/compaction.h"
#include "kernels/cuda/device_region.h"
#include "kernels/row_offset.h"
#include "tests/engine/run_operation.h"
#include "tests/kernels/cuda/cublas_fixture.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/device_prompt.h"
#include "tests/kernels/cuda/emulated_runtime.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using Set = std::vector<int32_t>;

constexpr int64_t kEnough = int64_t{16} << 20;
constexpr int64_t kLeastWithCublas = int64_t{4608} << 10;
constexpr const char* kPolicies[] = {
    "snapkv", "tova",          "knorm", "compilerkv", "observation_heads",
    "full",   "streaming_llm", "random"};

std::string Text(const absl::Status& status) { return std::string(status.message()); }

BackendOptions Fixed(int64_t bytes) {
  BackendOptions options;
  options.device_memory_bytes = bytes;
  return options;
}

class EmulatedMemory : public ::testing::Test {
 protected:
  static fakes::PromptShape Shape() {
    fakes::PromptShape shape;
    shape.num_layers = 4;
    shape.dtype = DType::kBF16;
    shape.layout = fakes::KvLayout::kPaged;
    shape.seq_len = 291;
    return shape;
  }

  engine::OperationSpec Spec(const std::string& policy) const {
    engine::OperationSpec spec = prompt_.spec();
    spec.policy = policy;
    spec.budget.kind = engine::Budget::Kind::kTokens;
    spec.budget.tokens = 40;
    spec.ppl = 10.0;
    spec.table = fakes::MakeTableFor(policy, prompt_.model());
    return spec;
  }

  // A whole operation, all layers at once.
  absl::StatusOr<engine::OperationResult> Run(engine::Bench& bench,
                                              const engine::OperationSpec& spec) const {
    auto operation = bench.Begin(spec);
    if (!operation.ok()) return operation.status();
    if (absl::Status seen = (*operation)->ObserveLayers(memory_.layers()); !seen.ok()) return seen;
    const auto finished = (*operation)->Finish();
    if (!finished.ok()) return finished.status();
    return **finished;
  }

  std::vector<Set> Sets(engine::Bench& bench, const std::string& policy) const {
    const auto result = Run(bench, Spec(policy));
    EXPECT_TRUE(result.ok()) << policy << ": " << result.status();
    std::vector<Set> sets;
    if (!result.ok()) return sets;
    for (const engine::LayerResult& layer : result->layers) {
      sets.insert(sets.end(), layer.keep_indices.begin(), layer.keep_indices.end());
    }
    return sets;
  }

  fakes::SyntheticPrompt prompt_{Shape()};
  DevicePrompt memory_{prompt_};
};

TEST_F(EmulatedMemory, OperationsOfEveryPolicyAllocateNothing) {
  engine::Bench growing(*NewCudaBackend({}));
  engine::Bench fixed(*NewCudaBackend(Fixed(kEnough)));
  for (const char* policy : kPolicies) {
    const std::vector<Set> want = Sets(growing, policy);
    const cuda::EmulatedCounts before = cuda::CountsSoFar();
    EXPECT_EQ(Sets(fixed, policy), want) << policy;
    const cuda::EmulatedCounts after = cuda::CountsSoFar();
    EXPECT_EQ(after.allocations, before.allocations) << policy;
    EXPECT_EQ(after.frees, before.frees) << policy;
    const DeviceMemoryUse use = fixed.backend().MemoryUse();
    EXPECT_EQ(use.reserved_bytes, kEnough);
    EXPECT_EQ(use.used_bytes, 0) << policy;
  }
  EXPECT_GT(fixed.backend().MemoryUse().peak_bytes, 0);
}

// Nor page-locked host memory, although uploads begin with a small ring in every operation.
TEST_F(EmulatedMemory, WarmOperationsAllocateNoHostMemory) {
  engine::Bench bench(*NewCudaBackend(Fixed(kEnough)));
  Sets(bench, "compilerkv");
  const int64_t before = cuda::CountsSoFar().host_allocations;
  Sets(bench, "compilerkv");
  EXPECT_EQ(cuda::CountsSoFar().host_allocations, before);
}

TEST_F(EmulatedMemory, WhatDoesNotFitIsNamedAndTheNextOperationRuns) {
  engine::Bench bench(*NewCudaBackend(Fixed(cuda::kLeastDeviceMemoryBytes)));
  {
    // Takes nearly all of it.
    const auto buffer = bench.backend().NewBuffer(1, (480 << 10) / sizeof(float));
    ASSERT_TRUE(buffer.ok()) << buffer.status();
    const absl::Status status = Run(bench, Spec("snapkv")).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(Text(status), AllOf(HasSubstr("bytes of device memory do not fit: of "
                                              "device_memory_bytes=524288 "),
                                    HasSubstr("of them in one piece")));
  }
  EXPECT_EQ(bench.backend().MemoryUse().used_bytes, 0);
  EXPECT_TRUE(Run(bench, Spec("snapkv")).ok());
}

TEST_F(EmulatedMemory, WhatDoesNotFitKeepsEverythingWhereThatIsAskedFor) {
  engine::Bench bench(*NewCudaBackend(Fixed(cuda::kLeastDeviceMemoryBytes)));
  // So that a layer finds none, and so that not even the beginning does.
  for (const int64_t taken : {int64_t{480} << 10, cuda::kLeastDeviceMemoryBytes}) {
    const auto buffer = bench.backend().NewBuffer(1, taken / int64_t{sizeof(float)});
    ASSERT_TRUE(buffer.ok()) << buffer.status();
    for (const char* policy : {"snapkv", "tova", "knorm", "compilerkv", "observation_heads"}) {
      engine::OperationSpec spec = Spec(policy);
      spec.on_short_memory = engine::OnShortMemory::kKeepFull;
      const auto result = Run(bench, spec);
      ASSERT_TRUE(result.ok()) << policy << ": " << result.status();
      EXPECT_EQ(result->outcome, engine::Outcome::kKeptFull) << policy;
      EXPECT_EQ(result->reason, engine::Reason::kShed) << policy;
    }
  }
}

TEST_F(EmulatedMemory, WithoutHostMemoryEverythingIsKeptWhereThatIsAskedFor) {
  engine::Bench bench(*NewCudaBackend(Fixed(kEnough)));
  engine::OperationSpec spec = Spec("snapkv");
  cuda::LimitEmulatedHostMemory(cuda::HostMemory::kNone);
  const absl::Status refused = Run(bench, spec).status();
  spec.on_short_memory = engine::OnShortMemory::kKeepFull;
  const auto kept = Run(bench, spec);
  cuda::LimitEmulatedHostMemory(cuda::HostMemory::kPlenty);
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Text(refused), HasSubstr("bytes of page-locked host memory"));
  ASSERT_TRUE(kept.ok()) << kept.status();
  EXPECT_EQ(kept->outcome, engine::Outcome::kKeptFull);
  EXPECT_EQ(kept->reason, engine::Reason::kShed);
  const auto next = Run(bench, spec);
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_EQ(next->outcome, engine::Outcome::kCompressed);
}

// The most bytes that somebody else may hold of the region while `serves` is true.
int64_t MostTaken(engine::Bench& bench, const std::function<bool()>& serves) {
  constexpr int64_t kStep = 2048;
  int64_t fits = 0;
  int64_t too_much = bench.backend().MemoryUse().reserved_bytes / kStep;
  while (too_much - fits > 1) {
    const int64_t taken = (fits + too_much) / 2;
    const auto buffer = bench.backend().NewBuffer(1, taken * kStep / int64_t{sizeof(float)});
    EXPECT_TRUE(buffer.ok()) << buffer.status();
    (serves() ? fits : too_much) = taken;
  }
  return fits * kStep;
}

TEST_F(EmulatedMemory, ShadowGivesWayToItsOperation) {
  engine::Bench bench(*NewCudaBackend(Fixed(kEnough)));
  const auto observe = [&](engine::Operation& operation) {
    for (const engine::ObservedLayer& layer : memory_.layers()) {
      const absl::Status seen = operation.Observe(layer.layer, layer.observation);
      if (!seen.ok()) return seen;
    }
    return operation.Finish().status();
  };
  engine::OperationSpec spec = Spec("compilerkv");
  const int64_t taken = MostTaken(bench, [&] { return observe(**bench.Begin(spec)).ok(); });
  spec.shadow_table = spec.table;
  // As far as the shadow gets with what is left, from nothing to all it needs.
  bool has_failed = false;
  bool has_served = false;
  for (int64_t left = taken; left > 0 && !has_served; left -= 8192) {
    const auto buffer = bench.backend().NewBuffer(1, left / int64_t{sizeof(float)});
    ASSERT_TRUE(buffer.ok()) << buffer.status();
    auto operation = *bench.Begin(spec);
    const absl::Status seen = observe(*operation);
    EXPECT_TRUE(seen.ok()) << taken - left << " bytes left for the shadow: " << seen;
    const absl::Status shadow = operation->TakeShadow().status();
    (shadow.ok() ? has_served : has_failed) = true;
    if (!shadow.ok()) {
      EXPECT_EQ(shadow.code(), absl::StatusCode::kResourceExhausted) << shadow;
    }
  }
  EXPECT_TRUE(has_failed);
  EXPECT_TRUE(has_served);
}

TEST_F(EmulatedMemory, LeastWithCublasServesAnOperation) {
  BackendOptions options = CublasOptions();
  options.device_memory_bytes = kLeastWithCublas;
  engine::Bench bench(*NewCudaBackend(options));
  const auto result = Run(bench, Spec("snapkv"));
  EXPECT_TRUE(result.ok()) << result.status();
}

TEST_F(EmulatedMemory, TheCallersMemoryIsUsedAndStaysTheCallers) {
  constexpr int64_t kAround = 4096;
  const DeviceBytes memory(std::vector<std::byte>(kEnough + 2 * kAround, std::byte{0x5a}));
  BackendOptions options = Fixed(kEnough);
  options.device_memory = memory.data() + kAround;
  const cuda::EmulatedCounts before = cuda::CountsSoFar();
  {
    engine::Bench bench(*NewCudaBackend(options));
    Sets(bench, "compilerkv");
  }
  const cuda::EmulatedCounts after = cuda::CountsSoFar();
  EXPECT_EQ(after.allocations, before.allocations);
  EXPECT_EQ(after.frees, before.frees);
  const std::vector<std::byte> read = memory.Read();
  const auto is_untouched = [](std::byte byte) { return byte == std::byte{0x5a}; };
  EXPECT_TRUE(std::all_of(read.begin(), read.begin() + kAround, is_untouched));
  EXPECT_TRUE(std::all_of(read.end() - kAround, read.end(), is_untouched));
  EXPECT_FALSE(std::all_of(read.begin(), read.end(), is_untouched));
}

MutableKvView Writable(const KvView& view) {
  MutableKvView x;
  x.data = const_cast<std::byte*>(view.data);
  x.size_bytes = view.size_bytes;
  x.dtype = view.dtype;
  x.num_kv_heads = view.num_kv_heads;
  x.seq_len = view.seq_len;
  x.head_dim = view.head_dim;
  x.head_stride = view.head_stride;
  x.token_stride = view.token_stride;
  x.block_size = view.block_size;
  x.block_stride = view.block_stride;
  x.block_table = view.block_table;
  return x;
}

// K and V of a finished operation, to be compacted in memory of the device that is theirs.
class InPlaceMemory : public EmulatedMemory {
 protected:
  static std::vector<engine::LayerInPlace> Moves(const DevicePrompt& memory) {
    std::vector<engine::LayerInPlace> moves;
    for (const engine::ObservedLayer& one : memory.layers()) {
      moves.push_back({one.layer, Writable(one.observation.k), Writable(one.observation.v)});
    }
    return moves;
  }
  static std::vector<std::byte> BytesOf(absl::Span<const engine::LayerInPlace> moves) {
    std::vector<std::byte> bytes;
    for (const engine::LayerInPlace& one : moves) {
      for (const MutableKvView& x : {one.k, one.v}) {
        const size_t begin = bytes.size();
        bytes.resize(begin + static_cast<size_t>(x.size_bytes));
        EXPECT_EQ(cudaMemcpy(bytes.data() + begin, x.data, static_cast<size_t>(x.size_bytes),
                             cudaMemcpyDeviceToHost),
                  cudaSuccess);
      }
    }
    return bytes;
  }

  std::unique_ptr<engine::Operation> Finished(engine::Bench& bench) const {
    engine::OperationSpec spec = Spec("knorm");
    spec.on_short_memory = engine::OnShortMemory::kKeepFull;
    auto operation = *bench.Begin(spec);
    EXPECT_TRUE(operation->ObserveLayers(memory_.layers()).ok());
    EXPECT_EQ((*operation->Finish())->outcome, engine::Outcome::kCompressed);
    // Waits, which returns what scores took.
    EXPECT_TRUE(operation->GatherLayers({}).ok());
    return operation;
  }

  // All that is free, until it is dropped.
  static std::vector<std::unique_ptr<ScoreBuffer>> TakeTheRest(engine::Bench& bench) {
    std::vector<std::unique_ptr<ScoreBuffer>> taken;
    for (int64_t floats = int64_t{1} << 20; floats >= 64; floats /= 2) {
      while (true) {
        auto buffer = bench.backend().NewBuffer(1, floats);
        if (!buffer.ok()) break;
        taken.push_back(*std::move(buffer));
      }
    }
    return taken;
  }
};

TEST_F(InPlaceMemory, WithoutRoomNothingMovesAndEverythingIsKept) {
  engine::Bench bench(*NewCudaBackend(Fixed(cuda::kLeastDeviceMemoryBytes)));
  const std::vector<engine::LayerInPlace> moves = Moves(memory_);
  const std::vector<std::byte> before = BytesOf(moves);
  const auto operation = Finished(bench);
  const auto taken = TakeTheRest(bench);
  EXPECT_EQ(operation->ReserveInPlace(moves).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(operation->is_short_of_memory());
  const engine::OperationResult& result = operation->FinishKeptFull(engine::Reason::kShed);
  EXPECT_EQ(result.outcome, engine::Outcome::kKeptFull);
  EXPECT_EQ(result.reason, engine::Reason::kShed);
  EXPECT_EQ(BytesOf(moves), before);
}

TEST_F(InPlaceMemory, WhatIsReservedIsEnoughForEveryLayer) {
  engine::Bench growing(*NewCudaBackend({}));
  const DevicePrompt twin(prompt_);
  const auto reference = Finished(growing);
  for (const engine::LayerInPlace& one : Moves(twin)) {
    ASSERT_TRUE(reference->GatherInPlace(one.layer, one.k, one.v).ok());
  }

  engine::Bench fixed(*NewCudaBackend(Fixed(cuda::kLeastDeviceMemoryBytes)));
  const std::vector<engine::LayerInPlace> moves = Moves(memory_);
  const auto operation = Finished(fixed);
  const absl::Status reserved = operation->ReserveInPlace(moves);
  ASSERT_TRUE(reserved.ok()) << reserved;
  const auto taken = TakeTheRest(fixed);
  for (const engine::LayerInPlace& one : moves) {
    const absl::Status moved = operation->GatherInPlace(one.layer, one.k, one.v);
    ASSERT_TRUE(moved.ok()) << moved;
  }
  EXPECT_EQ(BytesOf(moves), BytesOf(Moves(twin)));
}

TEST_F(InPlaceMemory, ALayerThatWasNotReservedMovesWhollyOrNotAtAll) {
  engine::Bench bench(*NewCudaBackend(Fixed(cuda::kLeastDeviceMemoryBytes)));
  const std::vector<engine::LayerInPlace> moves = Moves(memory_);
  const std::vector<std::byte> before = BytesOf(moves);
  const auto operation = Finished(bench);
  {
    const auto taken = TakeTheRest(bench);
    EXPECT_EQ(operation->GatherInPlace(0, moves[0].k, moves[0].v).code(),
              absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(BytesOf(moves), before);
  }
  EXPECT_TRUE(operation->GatherInPlace(0, moves[0].k, moves[0].v).ok());
  EXPECT_NE(BytesOf(moves), before);
}

TEST_F(InPlaceMemory, RowsGoThroughTheScratchThereIs) {
  constexpr int64_t kLong = 6000;
  std::mt19937 rng(5);
  KvTensor twin(RandomValues(rng, kLong * 64, DType::kF32), 1, kLong, 64, DType::kF32,
                Layout::kPaged);
  const DeviceKv device(twin);
  Set kept;
  for (int32_t t = 0; t < kLong; ++t) {
    if (t % 5 != 2) kept.push_back(t);
  }
  ASSERT_GT(kept.size() * 64 * sizeof(float), size_t{1} << 20);
  const std::vector<absl::Span<const int32_t>> sets = {kept};
  CompactHead(sets, twin.mutable_view(), 0);

  const auto backend = *NewCudaBackend(Fixed(int64_t{1} << 20));
  const auto context = *backend->NewContext();
  const absl::Status status = backend->CompactRows(*context, sets, device.mutable_view());
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(device.Read(), twin.bytes());
}

TEST_F(InPlaceMemory, RowsOfHostMemoryNeedNone) {
  engine::Bench bench(*NewCudaBackend(Fixed(cuda::kLeastDeviceMemoryBytes)));
  std::mt19937 rng(5);
  KvTensor twin(RandomValues(rng, 2 * 300 * 64, DType::kBF16), 2, 300, 64, DType::kBF16,
                Layout::kNhd);
  KvTensor host = twin;
  const Set kept = {1, 7, 100, 299};
  const std::vector<absl::Span<const int32_t>> sets = {kept};
  for (int64_t head = 0; head < 2; ++head) CompactHead(sets, twin.mutable_view(), head);
  const auto context = *bench.backend().NewContext();
  const auto taken = TakeTheRest(bench);
  const absl::Status status = bench.backend().CompactRows(*context, sets, host.mutable_view());
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(host.bytes(), twin.bytes());
}

// Gathers of eight tensors of 600 KiB from host memory to host memory.
void ExpectHostGathersRun(ComputeBackend& backend) {
  constexpr int64_t kTokens = 2400;
  std::mt19937 rng(3);
  const Set kept = {0, 5, 77, 2399};
  const std::vector<absl::Span<const int32_t>> sets = {kept};
  std::vector<KvTensor> sources;
  std::vector<KvTensor> wanted;
  std::vector<KvTensor> gathered;
  for (int i = 0; i < 8; ++i) {
    sources.emplace_back(RandomValues(rng, 2 * kTokens * 64, DType::kBF16), 2, kTokens, 64,
                         DType::kBF16, Layout::kNhd);
    gathered.emplace_back(RandomValues(rng, 2 * 4 * 64, DType::kBF16), 2, 4, 64, DType::kBF16,
                          Layout::kNhd);
    wanted.push_back(sources.back());
    for (int64_t head = 0; head < 2; ++head) CompactHead(sets, wanted.back().mutable_view(), head);
  }
  std::vector<GatherTask> tasks;
  for (int i = 0; i < 8; ++i) {
    tasks.push_back({sources[i].view(), sets, gathered[i].mutable_view(), "layer"});
  }
  const auto context = *backend.NewContext();
  const absl::Status status = backend.GatherRowsOfEach(*context, tasks);
  ASSERT_TRUE(status.ok()) << status;
  for (int i = 0; i < 8; ++i) {
    for (int64_t head = 0; head < 2; ++head) {
      for (int64_t row = 0; row < 4; ++row) {
        const KvView got = gathered[i].view();
        const KvView want = wanted[i].view();
        EXPECT_EQ(std::memcmp(got.data + RowOffsetBytes(got, head, row),
                              want.data + RowOffsetBytes(want, head, row), 64 * 2),
                  0)
            << "tensor " << i << " head " << head << " row " << row;
      }
    }
  }
}

TEST_F(EmulatedMemory, HostTensorsGoInPartsThatFitASmallRegion) {
  const auto backend = *NewCudaBackend(Fixed(int64_t{2} << 20));
  ExpectHostGathersRun(*backend);
}

TEST_F(EmulatedMemory, HostTensorsGoInPartsThatFitWhatOthersLeave) {
  const auto backend = *NewCudaBackend(Fixed(int64_t{64} << 20));
  const auto taken = backend->NewBuffer(1, (int64_t{62} << 20) / int64_t{sizeof(float)});
  ASSERT_TRUE(taken.ok()) << taken.status();
  ExpectHostGathersRun(*backend);
}

}  // namespace
}  // namespace keepset::kernels
