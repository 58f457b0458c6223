// Streams that an operation cannot have, and what the host calls while one runs: what only the
// emulator can show.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/cuda_context.h"
#include "tests/engine/run_operation.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/device_prompt.h"
#include "tests/kernels/cuda/emulated_runtime.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

namespace {

using cuda::EmulatedCounts;
using ::testing::HasSubstr;

cudaStream_t NewStream() {
  cudaStream_t stream = nullptr;
  EXPECT_EQ(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, 0), cudaSuccess);
  return stream;
}

class EmulatedStream : public CudaTest {
 protected:
  absl::Status Refusal(cudaStream_t stream) { return cuda_.backend->NewContext({stream}).status(); }
};

// As on a device, so that a test which does not wait for its own uploads fails here.
TEST_F(EmulatedStream, DoesNotWaitForAnUploadOfPageableMemory) {
  const std::vector<uint32_t> sent(8, 7);
  std::vector<uint32_t> found(sent.size());
  const size_t bytes = sent.size() * sizeof(sent[0]);
  void* data = nullptr;
  ASSERT_EQ(cudaMalloc(&data, bytes), cudaSuccess);
  const cudaStream_t stream = NewStream();
  const auto read = [&] {
    EXPECT_EQ(cudaMemcpyAsync(found.data(), data, bytes, cudaMemcpyDeviceToHost, stream),
              cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    return found;
  };
  EXPECT_EQ(cudaMemcpy(data, sent.data(), bytes, cudaMemcpyHostToDevice), cudaSuccess);
  EXPECT_NE(read(), sent);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(read(), sent);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  EXPECT_EQ(cudaFree(data), cudaSuccess);
}

TEST_F(EmulatedStream, OfAnotherDeviceIsRefused) {
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  const cudaStream_t stream = NewStream();
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  EXPECT_EQ(Refusal(stream),
            absl::InvalidArgumentError("stream: of device 1, want one of device 0"));
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

TEST_F(EmulatedStream, DestroyedIsRefusedAndTheDeviceStaysHealthy) {
  const cudaStream_t stream = NewStream();
  ASSERT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  const absl::Status status = Refusal(stream);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("that is not destroyed"));
  EXPECT_TRUE(cuda_.backend->Health().ok());
}

TEST_F(EmulatedStream, InCaptureIsRefused) {
  const cudaStream_t stream = NewStream();
  cuda::SetEmulatedCapture(stream, cuda::Capture::kOn);
  const absl::Status status = Refusal(stream);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("want a stream that is not in capture"));
  cuda::SetEmulatedCapture(stream, cuda::Capture::kOff);
  EXPECT_TRUE(Refusal(stream).ok());
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

// A capture that begins within an operation gets none of its kernels.
TEST_F(EmulatedStream, CaptureWithinAnOperationIsRefused) {
  const cudaStream_t stream = NewStream();
  auto context = cuda_.backend->NewContext({stream});
  ASSERT_TRUE(context.ok()) << context.status();
  const std::unique_ptr<ScoreBuffer> scores = cuda_.Buffer(1, 16);
  const int64_t launches = cuda::CountsSoFar().launches;
  cuda::SetEmulatedCapture(stream, cuda::Capture::kOn);
  EXPECT_EQ(cuda_.backend->DivideByRowMean(**context, 1e-6f, *scores).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(cuda::CountsSoFar().launches, launches);
  cuda::SetEmulatedCapture(stream, cuda::Capture::kOff);
  context->reset();
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

// What the operation queued may still run, and nothing is queued into the graph or waited for.
TEST_F(EmulatedStream, OperationThatEndsInCaptureGivesItsMemoryToNobody) {
  const cudaStream_t stream = NewStream();
  auto backend = *NewCudaBackend({});
  auto context = *backend->NewContext({stream});
  std::unique_ptr<ScoreBuffer> scores = *backend->NewBuffer(1, 4096);
  ASSERT_TRUE(backend->Fill(*context, 0, 4096, 1.0f, *scores).ok());
  const float* const memory = scores->data();
  cuda::SetEmulatedCapture(stream, cuda::Capture::kOn);
  const EmulatedCounts before = cuda::CountsSoFar();
  context.reset();
  scores.reset();
  EXPECT_EQ(cuda::CountsSoFar().waits, before.waits);
  EXPECT_EQ(cuda::CountsSoFar().frees, before.frees);
  EXPECT_TRUE(backend->Health().ok());
  EXPECT_NE((*backend->NewBuffer(1, 4096))->data(), memory);
  cuda::SetEmulatedCapture(stream, cuda::Capture::kOff);
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

// In a process of its own: the emulated device stays faulted as a real one does.
TEST(EmulatedStreamFault, FaultOfTheCallersKernelsIsTheDevices) {
  EXPECT_EXIT(
      {
        auto backend = *NewCudaBackend({});
        const cudaStream_t stream = NewStream();
        auto context = *backend->NewContext({stream});
        cuda::FaultNow(cudaErrorIllegalAddress);
        const absl::Status status = backend->Wait(*context);
        const bool answers =
            status.code() == absl::StatusCode::kInternal && !backend->Health().ok();
        context.reset();
        backend.reset();
        std::exit(answers ? 0 : 1);
      },
      ::testing::ExitedWithCode(0), "");
}

// As of a worker that was forked from a process with a device, and of a context that is gone.
TEST(EmulatedStreamFault, ProcessThatLostItsDriverHasNoHealthyDevice) {
  for (const int error : {3, 4, 201, 999}) {
    EXPECT_EXIT(
        {
          auto backend = *NewCudaBackend({});
          auto context = *backend->NewContext();
          cuda::FaultNow(static_cast<cudaError_t>(error));
          const absl::Status status = backend->Wait(*context);
          const bool answers =
              status.code() == absl::StatusCode::kInternal && !backend->Health().ok();
          context.reset();
          backend.reset();
          std::exit(answers ? 0 : 1);
        },
        ::testing::ExitedWithCode(0), "")
        << error;
  }
}

// Of a stream the runtime also says so when the stream had a context of its own.
TEST(EmulatedStreamFault, ContextThatAStreamTookAlongIsNotTheDevices) {
  for (const int error : {201, 709}) {
    EXPECT_EXIT(
        {
          auto backend = *NewCudaBackend({});
          const cudaStream_t stream = NewStream();
          cuda::FaultNow(static_cast<cudaError_t>(error));
          const absl::Status status = backend->NewContext({stream}).status();
          const bool answers =
              status.code() == absl::StatusCode::kInvalidArgument && backend->Health().ok();
          std::exit(answers ? 0 : 1);
        },
        ::testing::ExitedWithCode(0), "")
        << error;
  }
}

// Blocks of the device may be larger than they were asked for, page-locked ones are not.
TEST(EmulatedUpload, FitsTheSmallerOfBothCopies) {
  cuda::DeviceTraits traits;
  cuda::DeviceHealth health;
  cuda::DevicePool pool(0, health, int64_t{1} << 30);
  cuda::StreamState state(traits, health, pool);
  ASSERT_TRUE(state.Prepare().ok());
  state.Begin(nullptr);
  const std::vector<std::byte> data(300'000, std::byte{7});
  for (const int64_t bytes : {300'000, 200'000, 300'000}) {
    const auto uploaded = state.Upload(data.data(), bytes);
    ASSERT_TRUE(uploaded.ok()) << uploaded.status();
    ASSERT_TRUE(cudaStreamSynchronize(state.stream()) == cudaSuccess);
    EXPECT_EQ(std::memcmp(*uploaded, data.data(), static_cast<size_t>(bytes)), 0);
  }
  EXPECT_TRUE(state.Reset().ok());
}

TEST_F(EmulatedStream, OfTheCallerIsNotDestroyed) {
  const cudaStream_t stream = NewStream();
  EXPECT_TRUE(cuda_.backend->NewContext({stream}).ok());
  auto backend = *NewCudaBackend({});
  EXPECT_TRUE(backend->NewContext({stream}).ok());
  backend.reset();
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

TEST_F(EmulatedStream, WaitOfAnOperationIsForItsOwn) {
  const cudaStream_t stream = NewStream();
  const auto context = *cuda_.backend->NewContext({stream});
  bool has_run = false;
  ASSERT_EQ(cuda::QueueEmulated(stream, [&] { has_run = true; }), cudaSuccess);
  ASSERT_TRUE(cuda_.backend->Wait(*cuda_.context).ok());
  EXPECT_FALSE(has_run);
  ASSERT_TRUE(cuda_.backend->Wait(*context).ok());
  EXPECT_TRUE(has_run);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

// Whatever the policy: of tensors in device memory nothing is waited for but results, and nothing
// is allocated.
TEST_F(EmulatedStream, WarmOperationAllocatesNothingAndWaitsForResultsAlone) {
  fakes::PromptShape shape;
  shape.num_layers = 5;
  shape.dtype = DType::kBF16;
  shape.layout = fakes::KvLayout::kPaged;
  const fakes::SyntheticPrompt prompt(shape);
  const DevicePrompt memory(prompt);
  const cudaStream_t stream = NewStream();
  engine::Bench bench(*NewCudaBackend({}));
  const struct {
    const char* policy;
    int64_t waits;  // for scores, masses and cuts; one more ends the operation
  } cases[] = {
      {"snapkv", 3}, {"tova", 3}, {"knorm", 3}, {"compilerkv", 5}, {"observation_heads", 4}};
  for (const auto& [policy, waits] : cases) {
    const auto run = [&] {
      engine::OperationSpec spec = prompt.spec();
      spec.policy = policy;
      spec.budget.kind = engine::Budget::Kind::kTokens;
      spec.budget.tokens = 20;
      spec.ppl = 10.0;
      spec.table = fakes::MakeTableFor(policy, prompt.model());
      spec.device_stream = stream;
      auto operation = bench.Begin(spec);
      ASSERT_TRUE(operation.ok()) << operation.status();
      EXPECT_TRUE((*operation)->ObserveLayers(memory.layers()).ok());
      EXPECT_TRUE((*operation)->Finish().ok());
    };
    // A block that serves a smaller use the first time leaves a larger one without.
    for (int i = 0; i < 3; ++i) run();
    const EmulatedCounts before = cuda::CountsSoFar();
    run();
    const EmulatedCounts after = cuda::CountsSoFar();
    EXPECT_EQ(after.allocations, before.allocations) << policy;
    EXPECT_EQ(after.frees, before.frees) << policy;
    EXPECT_EQ(after.host_allocations, before.host_allocations) << policy;
    EXPECT_EQ(after.waits - before.waits, waits) << policy;
  }
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

// Ops that hand nothing to the host, one after the other: the first to wait is Wait.
TEST_F(EmulatedStream, NoOpWaits) {
  std::mt19937 rng(1);
  const KvTensor k(RandomValues(rng, 2 * 300 * 16, DType::kBF16), 2, 300, 16, DType::kBF16,
                   Layout::kPaged, 16, 8);
  const DenseTensor q(RandomValues(rng, 4 * 8 * 16, DType::kBF16), 4, 8, 16, DType::kBF16);
  const DenseTensor tile(std::vector<float>(4 * 8 * 300, 0.5f), 4, 8, 300, DType::kF32);
  const DeviceKv device_k(k);
  const DeviceDense device_q(q);
  const DeviceDense device_tile(tile);
  const std::vector<int64_t> positions = LastPositions(8, 300);
  WindowArgs window;
  window.q = device_q.queries();
  window.k = device_k.view();
  window.row_positions = positions;
  window.softmax_scale = 0.25f;
  TileArgs given;
  given.tile = device_tile.tile();
  given.row_positions = positions;
  const std::vector<int64_t> heads = {0, 1};
  const std::unique_ptr<ScoreBuffer> columns = cuda_.Buffer(4, 300);
  const std::unique_ptr<ScoreBuffer> norms = cuda_.Buffer(2, 300);
  const std::unique_ptr<ScoreBuffer> scores = cuda_.Buffer(1, 300);
  ComputeBackend& backend = *cuda_.backend;
  OpContext& context = *cuda_.context;
  const auto queue = [&] {
    EXPECT_TRUE(backend.WindowColumns(context, window, *columns).ok());
    EXPECT_TRUE(backend.TileColumns(context, given, *columns).ok());
    EXPECT_TRUE(backend.RowNorms(context, device_k.view(), "k", *norms).ok());
    EXPECT_TRUE(backend.KeyNovelty(context, device_k.view(), heads, "k", *norms).ok());
    EXPECT_TRUE(backend.MergeRows(context, *columns, Merge::kMean, {}, *scores).ok());
    EXPECT_TRUE(backend.NormalizeRows(context, Normalization::kStandardize, {}, *scores).ok());
    EXPECT_TRUE(backend.DivideByRowMean(context, 1e-6f, *columns).ok());
    EXPECT_TRUE(backend.Accumulate(context, *scores, Merge::kSum, 1.0f, *scores).ok());
    EXPECT_TRUE(backend.Multiply(context, *scores, 2.0f, *columns).ok());
    EXPECT_TRUE(backend.Pool(context, PoolKind::kAverage, 41, 300, *scores).ok());
    EXPECT_TRUE(backend.Pool(context, PoolKind::kMax, 5, 300, *scores).ok());
    EXPECT_TRUE(backend.DilateForward(context, 40, *scores).ok());
    EXPECT_TRUE(backend.Fill(context, 0, 4, 1.0f, *scores).ok());
  };
  queue();
  ASSERT_TRUE(backend.Wait(context).ok());
  const EmulatedCounts before = cuda::CountsSoFar();
  queue();
  const EmulatedCounts after = cuda::CountsSoFar();
  EXPECT_EQ(after.waits, before.waits);
  EXPECT_EQ(after.allocations, before.allocations);
  EXPECT_EQ(after.frees, before.frees);
  EXPECT_EQ(after.host_allocations, before.host_allocations);
  EXPECT_TRUE(backend.Wait(context).ok());
}

}  // namespace
}  // namespace keepset::kernels
