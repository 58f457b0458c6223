// Operations in device memory of a fixed size.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "kernels/cuda/device_region.h"
#include "tests/engine/run_operation.h"
#include "tests/kernels/cuda/cublas_fixture.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/device_prompt.h"
#include "tests/kernels/cuda/emulated_runtime.h"

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
    if (!shadow.ok()) EXPECT_EQ(shadow.code(), absl::StatusCode::kResourceExhausted) << shadow;
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

class DeviceMemoryOptions : public ::testing::Test {
 protected:
  static absl::Status Refusal(const BackendOptions& options) {
    return NewCudaBackend(options).status();
  }
  static absl::Status RefusalOf(void* memory, int64_t bytes) {
    BackendOptions options = Fixed(bytes);
    options.device_memory = memory;
    return Refusal(options);
  }
};

TEST_F(DeviceMemoryOptions, TooLittleIsRefused) {
  for (const int64_t bytes : {int64_t{-1}, int64_t{1}, cuda::kLeastDeviceMemoryBytes - 1}) {
    const absl::Status status = Refusal(Fixed(bytes));
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bytes;
    EXPECT_THAT(Text(status), HasSubstr("want 0 or 524288 or more"));
  }
}

TEST_F(DeviceMemoryOptions, CublasWantsRoomForItsProducts) {
  BackendOptions options = CublasOptions();
  options.device_memory_bytes = kLeastWithCublas - 1;
  const absl::Status status = Refusal(options);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Text(status), HasSubstr("device_memory_bytes=4718591, want 0 or 4718592 or more"));
  options.device_memory_bytes = kLeastWithCublas;
  EXPECT_TRUE(Refusal(options).ok());
}

TEST_F(DeviceMemoryOptions, MemoryThatIsNotTheDevicesIsRefused) {
  const DeviceBytes memory{std::vector<std::byte>(1 << 20)};
  alignas(256) static std::byte aligned[1 << 20];
  EXPECT_EQ(RefusalOf(memory.data(), 0).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Text(RefusalOf(memory.data() + 128, 1 << 19)), HasSubstr("a multiple of 256"));
  EXPECT_THAT(Text(RefusalOf(aligned, 1 << 20)),
              HasSubstr("want memory of cudaMalloc on device 0"));
  EXPECT_THAT(Text(RefusalOf(memory.data(), (1 << 20) + 4096)),
              HasSubstr("not memory of a device from its first to its last byte"));
  cuda::PlaceElsewhere(memory.data());
  EXPECT_THAT(Text(RefusalOf(memory.data(), 1 << 20)),
              HasSubstr("of device 1, want memory of device 0"));
  cuda::PlaceElsewhere(nullptr);
  EXPECT_TRUE(RefusalOf(memory.data(), 1 << 20).ok());
}

TEST_F(DeviceMemoryOptions, ADeviceWithoutSoMuchIsRefusedWithWhatItHas) {
  cuda::LimitEmulatedMemory(3 << 20);
  const absl::Status status = Refusal(Fixed(4 << 20));
  cuda::LimitEmulatedMemory(size_t{1} << 40);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Text(status), HasSubstr("device_memory_bytes=4194304: device 0 has 3145728 of "
                                      "6291456 bytes free, want a smaller size, or to start"));
}

}  // namespace
}  // namespace keepset::kernels
