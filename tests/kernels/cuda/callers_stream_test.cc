// Operations on a stream that is their caller's.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/engine/run_operation.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/device_prompt.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

namespace {

using Set = std::vector<int32_t>;

class CallersStream : public CudaTest {
 protected:
  CallersStream() : prompt_(Shape()) {}

  void SetUp() override {
    CudaTest::SetUp();
    if (!IsSkipped()) bench_ = std::make_unique<engine::Bench>(*NewCudaBackend({}));
  }

  static fakes::PromptShape Shape() {
    fakes::PromptShape shape;
    shape.dtype = DType::kBF16;
    shape.seq_len = 291;
    return shape;
  }

  // Sets of a snapkv operation on `stream`.
  std::vector<Set> Run(cudaStream_t stream, const DevicePrompt& memory) {
    engine::OperationSpec spec = prompt_.spec();
    spec.policy = "snapkv";
    spec.budget.kind = engine::Budget::Kind::kTokens;
    spec.budget.tokens = 40;
    spec.device_stream = stream;
    auto operation = bench_->Begin(spec);
    EXPECT_TRUE(operation.ok()) << operation.status();
    if (!operation.ok()) return {};
    const absl::Status seen = (*operation)->ObserveLayers(memory.layers());
    EXPECT_TRUE(seen.ok()) << seen;
    const auto finished = (*operation)->Finish();
    EXPECT_TRUE(finished.ok()) << finished.status();
    std::vector<Set> sets;
    if (!finished.ok()) return sets;
    for (const engine::LayerResult& layer : (*finished)->layers) {
      sets.insert(sets.end(), layer.keep_indices.begin(), layer.keep_indices.end());
    }
    return sets;
  }

  fakes::SyntheticPrompt prompt_;
  std::unique_ptr<engine::Bench> bench_;
};

class Stream {
 public:
  Stream() {
    EXPECT_EQ(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, 0), cudaSuccess);
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess); }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// Keys and queries are copied to their place on the stream, and nobody waits for it.
TEST_F(CallersStream, WorkStandsBehindTheCallers) {
  const DevicePrompt memory(prompt_);
  const std::vector<Set> want = Run(nullptr, memory);
  const Stream stream;
  const DevicePrompt late(prompt_);
  for (const engine::ObservedLayer& layer : late.layers()) {
    auto* const k = const_cast<std::byte*>(layer.observation.k.data);
    const auto bytes = static_cast<size_t>(layer.observation.k.size_bytes);
    // All ones are NaN until then.
    ASSERT_EQ(cudaMemsetAsync(k, 0xff, bytes, stream.get()), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream.get()), cudaSuccess);
    ASSERT_EQ(cudaMemcpyAsync(k, memory.layer(layer.layer).observation.k.data, bytes,
                              cudaMemcpyDeviceToDevice, stream.get()),
              cudaSuccess);
  }
  EXPECT_EQ(Run(stream.get(), late), want);
}

TEST_F(CallersStream, DefaultStreamServes) {
  const DevicePrompt memory(prompt_);
  const std::vector<Set> want = Run(nullptr, memory);
  EXPECT_EQ(Run(cudaStreamLegacy, memory), want);
}

// An operation may go on on another thread, where the handle is another stream.
TEST_F(CallersStream, StreamOfEachThreadIsRefused) {
  const absl::Status status = (*NewCudaBackend({}))->NewContext({cudaStreamPerThread}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("want a stream that was created, or cudaStreamLegacy"),
            std::string::npos)
      << status;
}

// What an operation on the caller's stream leaves serves the next one, which has another stream.
TEST_F(CallersStream, EndsWithItsOperation) {
  const DevicePrompt memory(prompt_);
  std::vector<Set> want;
  {
    const Stream stream;
    want = Run(stream.get(), memory);
  }
  EXPECT_EQ(Run(nullptr, memory), want);
  const Stream other;
  EXPECT_EQ(Run(other.get(), memory), want);
}

}  // namespace
}  // namespace keepset::kernels
