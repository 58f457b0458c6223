// Operations while a stream of the process is captured into a graph, as an engine does at its start
// and whenever it meets a new batch size.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/relaxed_capture.h"
#include "tests/engine/run_operation.h"
#include "tests/kernels/cuda/device_prompt.h"
#include "tests/kernels/cuda/emulated_runtime.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

namespace {

class EmulatedCapture : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, 0), cudaSuccess);
  }
  void TearDown() override {
    SetCapture(cuda::Capture::kOff);
    EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  }

  // By a thread of the engine's.
  void SetCapture(cuda::Capture capture) {
    std::thread([&] { cuda::SetEmulatedCapture(stream_, capture); }).join();
  }

  static fakes::PromptShape Shape() {
    fakes::PromptShape shape;
    shape.num_layers = 3;
    shape.dtype = DType::kBF16;
    shape.layout = fakes::KvLayout::kPaged;
    return shape;
  }

  // A whole operation on a backend of its own, whose memory is cold, from its begin to its end.
  absl::Status Run(const std::string& policy, const BackendOptions& options,
                   absl::Span<const engine::ObservedLayer> layers) const {
    auto backend = NewCudaBackend(options);
    if (!backend.ok()) return backend.status();
    engine::Bench bench(*std::move(backend));
    engine::OperationSpec spec = prompt_.spec();
    spec.policy = policy;
    spec.budget.kind = engine::Budget::Kind::kTokens;
    spec.budget.tokens = 20;
    spec.ppl = 10.0;
    spec.table = fakes::MakeTableFor(policy, prompt_.model());
    auto operation = bench.Begin(spec);
    if (!operation.ok()) return operation.status();
    if (absl::Status seen = (*operation)->ObserveLayers(layers); !seen.ok()) return seen;
    const auto result = (*operation)->Finish();
    if (!result.ok()) return result.status();
    return (*result)->outcome == engine::Outcome::kCompressed
               ? absl::OkStatus()
               : absl::InternalError("nothing was compressed");
  }

  static cudaStreamCaptureMode ModeOfThisThread() {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    EXPECT_EQ(cudaThreadExchangeStreamCaptureMode(&mode), cudaSuccess);
    cudaStreamCaptureMode found = mode;
    EXPECT_EQ(cudaThreadExchangeStreamCaptureMode(&mode), cudaSuccess);
    return found;
  }

  const fakes::SyntheticPrompt prompt_{Shape()};
  const DevicePrompt memory_{prompt_};
  cudaStream_t stream_ = nullptr;
};

// As on a device, so that a call without the mode fails here.
TEST_F(EmulatedCapture, IsSpoiledByAnAllocationOfAnotherThread) {
  SetCapture(cuda::Capture::kOn);
  EXPECT_FALSE(cuda::IsEmulatedCaptureSpoiled());
  void* data = nullptr;
  EXPECT_EQ(cudaMalloc(&data, 256), cudaErrorStreamCaptureUnsupported);
  EXPECT_TRUE(cuda::IsEmulatedCaptureSpoiled());
  EXPECT_EQ(cudaGetLastError(), cudaErrorStreamCaptureUnsupported);
}

TEST_F(EmulatedCapture, IsSpoiledByAWaitForTheDeviceWhateverTheMode) {
  SetCapture(cuda::Capture::kOn);
  {
    cuda::DeviceHealth health;
    const cuda::RelaxedCapture relaxed(health);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorStreamCaptureUnsupported);
  }
  EXPECT_TRUE(cuda::IsEmulatedCaptureSpoiled());
  EXPECT_EQ(cudaGetLastError(), cudaErrorStreamCaptureUnsupported);
}

TEST_F(EmulatedCapture, GoesOnBesideColdOperationsOfEveryPolicy) {
  SetCapture(cuda::Capture::kOn);
  for (const char* policy : {"snapkv", "tova", "knorm", "compilerkv", "observation_heads"}) {
    const absl::Status status = Run(policy, {}, memory_.layers());
    EXPECT_TRUE(status.ok()) << policy << ": " << status;
    EXPECT_FALSE(cuda::IsEmulatedCaptureSpoiled()) << policy;
  }
}

TEST_F(EmulatedCapture, GoesOnBesideAnOperationInMemoryOfAFixedSize) {
  BackendOptions options;
  options.device_memory_bytes = int64_t{16} << 20;
  SetCapture(cuda::Capture::kOn);
  const absl::Status status = Run("compilerkv", options, memory_.layers());
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_FALSE(cuda::IsEmulatedCaptureSpoiled());
}

// Their copies are waited for.
TEST_F(EmulatedCapture, GoesOnBesideAnOperationOnHostMemory) {
  std::vector<engine::ObservedLayer> layers;
  for (int64_t i = 0; i < Shape().num_layers; ++i) layers.push_back({i, prompt_.observation(i)});
  SetCapture(cuda::Capture::kOn);
  const absl::Status status = Run("snapkv", {}, layers);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_FALSE(cuda::IsEmulatedCaptureSpoiled());
}

// Whatever thread ends the last owner of a block, outside of any call of a backend.
TEST_F(EmulatedCapture, GoesOnWhenMemoryIsGivenBack) {
  cuda::DeviceHealth health;
  cuda::DevicePool pool(0, health, 0);
  auto kept = std::make_unique<cuda::DevicePool>(0, health, int64_t{1} << 20);
  auto block = pool.Acquire(256);
  ASSERT_TRUE(block.ok()) << block.status();
  ASSERT_TRUE(kept->Acquire(256).ok());
  auto pinned = std::make_unique<cuda::PinnedBuffer>(health);
  ASSERT_TRUE(pinned->Reserve(256).ok());
  const int64_t blocks = cuda::NumDeviceAllocations();
  SetCapture(cuda::Capture::kOn);
  *block = cuda::DeviceBlock();
  block = absl::CancelledError();
  kept.reset();
  pinned.reset();
  EXPECT_FALSE(cuda::IsEmulatedCaptureSpoiled());
  EXPECT_EQ(cuda::NumDeviceAllocations(), blocks - 2);
}

TEST_F(EmulatedCapture, ModeOfTheCallersThreadIsTheOneBefore) {
  cudaStreamCaptureMode before = cudaStreamCaptureModeThreadLocal;
  ASSERT_EQ(cudaThreadExchangeStreamCaptureMode(&before), cudaSuccess);
  EXPECT_TRUE(Run("snapkv", {}, memory_.layers()).ok());
  EXPECT_EQ(ModeOfThisThread(), cudaStreamCaptureModeThreadLocal);
  EXPECT_EQ(cudaThreadExchangeStreamCaptureMode(&before), cudaSuccess);
}

TEST_F(EmulatedCapture, LegacyStreamIsRefusedBesideIt) {
  const auto backend = *NewCudaBackend({});
  SetCapture(cuda::Capture::kOn);
  EXPECT_EQ(backend->NewContext({cudaStreamLegacy}).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_FALSE(cuda::IsEmulatedCaptureSpoiled());
}

}  // namespace
}  // namespace keepset::kernels
