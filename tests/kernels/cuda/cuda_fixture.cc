#include "tests/kernels/cuda/cuda_fixture.h"

#include <cuda_runtime_api.h>

#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "kernels/backend_registry.h"
#include "tests/fakes/test_seed.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

namespace {

Machine NewMachine(std::unique_ptr<ComputeBackend> backend) {
  Machine machine;
  machine.backend = std::move(backend);
  absl::StatusOr<std::unique_ptr<OpContext>> context = machine.backend->NewContext();
  KEEPSET_CHECK(context.ok());
  machine.context = *std::move(context);
  return machine;
}

}  // namespace

bool HasDevice() {
  // The first answer: later ones may be of a device that a test has broken.
  static const bool has_device = [] {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return error == cudaSuccess
               ? count > 0
               : error != cudaErrorInsufficientDriver && error != cudaErrorNoDevice;
  }();
  return has_device;
}

DeviceBytes::DeviceBytes(const std::vector<std::byte>& bytes) : size_(bytes.size()) {
  void* data = nullptr;
  KEEPSET_CHECK(cudaMalloc(&data, size_) == cudaSuccess);
  KEEPSET_CHECK(cudaMemcpy(data, bytes.data(), size_, cudaMemcpyHostToDevice) == cudaSuccess);
  // The copy may still be under way, and the backend's stream does not wait for it.
  KEEPSET_CHECK(cudaDeviceSynchronize() == cudaSuccess);
  data_ = static_cast<std::byte*>(data);
}

DeviceBytes::~DeviceBytes() {
  if (cudaFree(data_) != cudaSuccess) ADD_FAILURE() << "cudaFree failed";
}

std::vector<std::byte> DeviceBytes::Read() const {
  std::vector<std::byte> bytes(size_);
  KEEPSET_CHECK(cudaMemcpy(bytes.data(), data_, size_, cudaMemcpyDeviceToHost) == cudaSuccess);
  return bytes;
}

DeviceKv::DeviceKv(const KvTensor& tensor)
    : memory_(tensor.bytes()),
      block_table_(tensor.view().block_table.begin(), tensor.view().block_table.end()),
      shape_(tensor.view()) {}

KvView DeviceKv::view() const {
  KvView view = shape_;
  view.data = memory_.data();
  view.block_table = block_table_;
  return view;
}

MutableKvView DeviceKv::mutable_view() const {
  MutableKvView view;
  view.data = memory_.data();
  view.size_bytes = shape_.size_bytes;
  view.dtype = shape_.dtype;
  view.num_kv_heads = shape_.num_kv_heads;
  view.seq_len = shape_.seq_len;
  view.head_dim = shape_.head_dim;
  view.head_stride = shape_.head_stride;
  view.token_stride = shape_.token_stride;
  view.block_size = shape_.block_size;
  view.block_stride = shape_.block_stride;
  view.block_table = block_table_;
  return view;
}

DeviceDense::DeviceDense(const DenseTensor& tensor)
    : memory_(std::vector<std::byte>(tensor.queries().data,
                                     tensor.queries().data + tensor.queries().size_bytes)),
      queries_(tensor.queries()),
      tile_(tensor.tile()),
      lse_(tensor.lse()) {
  queries_.data = memory_.data();
  tile_.data = memory_.data();
  lse_.data = memory_.data();
}

QueryView DeviceDense::queries() const { return queries_; }
TileView DeviceDense::tile() const { return tile_; }
LseView DeviceDense::lse() const { return lse_; }

std::unique_ptr<ScoreBuffer> Machine::Buffer(int64_t rows, int64_t cols) const {
  return Buffer(rows, cols,
                std::vector<float>(static_cast<size_t>(rows * cols),
                                   std::numeric_limits<float>::quiet_NaN()));
}

std::unique_ptr<ScoreBuffer> Machine::Buffer(int64_t rows, int64_t cols,
                                             const std::vector<float>& values) const {
  absl::StatusOr<std::unique_ptr<ScoreBuffer>> buffer = backend->NewBuffer(rows, cols);
  KEEPSET_CHECK(buffer.ok());
  KEEPSET_CHECK(backend->CopyFromHost(*context, values, **buffer).ok());
  return *std::move(buffer);
}

void Machine::PoisonKeptMemory() const {
  constexpr int kBlocksOfASize = 4;
  std::vector<std::unique_ptr<ScoreBuffer>> blocks;
  for (int64_t floats = 128; floats <= int64_t{64} << 10; floats *= 2) {
    for (int i = 0; i < kBlocksOfASize; ++i) blocks.push_back(Buffer(1, floats));
  }
  // The copies are over before anybody is lent the blocks.
  KEEPSET_CHECK(backend->Wait(*context).ok());
}

std::vector<float> Machine::Values(const ScoreBuffer& buffer) const {
  std::vector<float> values(static_cast<size_t>(buffer.rows() * buffer.cols()));
  const absl::Status status = backend->CopyToHost(*context, buffer, absl::MakeSpan(values));
  EXPECT_TRUE(status.ok()) << status;
  return values;
}

CudaTest::CudaTest() {
  const std::string seed = fakes::TestSeedText();
  if (!seed.empty()) {
    trace_.emplace(__FILE__, __LINE__, absl::StrCat(fakes::kTestSeedVariable, "=", seed));
  }
}

void CudaTest::SetUp() {
  absl::StatusOr<std::unique_ptr<ComputeBackend>> backend = NewCudaBackend({});
  if (!HasDevice()) GTEST_SKIP() << backend.status().message();
  ASSERT_TRUE(backend.ok()) << backend.status();
  cuda_ = NewMachine(*std::move(backend));
  cpu_ = NewMachine(CpuBackend());
}

}  // namespace keepset::kernels
