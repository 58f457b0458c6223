// What only the emulator can show: other orders of threads, faults of the device, and that a warm
// backend allocates nothing.
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "kernels/compute_backend.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/emulated_runtime.h"
#include "tests/kernels/cuda/simt_emulator.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

namespace {

class EmulatedBackend : public CudaTest {
 protected:
  // A layer of a score: window columns, merge, pool, selection.
  std::vector<int32_t> RunLayer() {
    std::mt19937 rng(1);
    const DenseTensor q(RandomValues(rng, 4 * 20 * 16, DType::kBF16), 4, 20, 16, DType::kBF16);
    const KvTensor k(RandomValues(rng, 2 * 400 * 16, DType::kBF16), 2, 400, 16, DType::kBF16,
                     Layout::kPaged, 16, 8);
    const DeviceDense device_q(q);
    const DeviceKv device_k(k);
    const std::vector<int64_t> positions = LastPositions(20, 400);
    WindowArgs args;
    args.q = device_q.queries();
    args.k = device_k.view();
    args.row_positions = positions;
    args.softmax_scale = 0.25f;
    const std::unique_ptr<ScoreBuffer> columns = cuda_.Buffer(4, 400);
    const std::unique_ptr<ScoreBuffer> scores = cuda_.Buffer(1, 400);
    ComputeBackend& backend = *cuda_.backend;
    EXPECT_TRUE(backend.WindowColumns(*cuda_.context, args, *columns).ok());
    EXPECT_TRUE(backend.MergeRows(*cuda_.context, *columns, Merge::kMean, {}, *scores).ok());
    EXPECT_TRUE(backend.Pool(*cuda_.context, PoolKind::kAverage, 5, 400, *scores).ok());
    columns_ = cuda_.Values(*columns);
    SelectArgs select;
    select.budget = 20;
    const auto selections =
        backend.Select(*cuda_.context, *scores, absl::MakeConstSpan(&select, 1));
    EXPECT_TRUE(selections.ok()) << selections.status();
    return selections.ok() ? (*selections)[0].keep_indices : std::vector<int32_t>();
  }

  std::vector<float> columns_;  // of the last layer
};

// Whoever asks for the last error of the thread next would take it for its own.
TEST_F(EmulatedBackend, MemoryOfASecondTryLeavesNoError) {
  cuda::FailNextAllocation();
  EXPECT_TRUE(cuda_.backend->NewBuffer(1, int64_t{1} << 20).ok());
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

TEST_F(EmulatedBackend, OrderOfThreadsDoesNotShow) {
  cuda::SetEmulationSeed(1);
  const std::vector<int32_t> first = RunLayer();
  const std::vector<float> columns = columns_;
  for (const uint32_t seed : {2u, 3u, 4u, 5u, 6u}) {
    cuda::SetEmulationSeed(seed);
    EXPECT_EQ(RunLayer(), first) << "seed " << seed;
    EXPECT_EQ(columns_, columns) << "seed " << seed;
  }
}

TEST_F(EmulatedBackend, WarmOperationsAllocateNothing) {
  RunLayer();
  RunLayer();
  const int64_t before = cuda::NumDeviceAllocations();
  RunLayer();
  EXPECT_EQ(cuda::NumDeviceAllocations(), before);
}

// A program with several devices calls us on a thread whose device is another.
TEST_F(EmulatedBackend, CallersDeviceStaysCurrent) {
  const std::vector<int32_t> want = RunLayer();
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  const auto current = [] {
    int device = -1;
    EXPECT_EQ(cudaGetDevice(&device), cudaSuccess);
    return device;
  };
  {
    const auto backend = NewCudaBackend({});
    ASSERT_TRUE(backend.ok()) << backend.status();
    EXPECT_EQ(current(), 1);
    const auto context = (*backend)->NewContext();
    ASSERT_TRUE(context.ok()) << context.status();
    EXPECT_EQ(current(), 1);
  }
  EXPECT_EQ(current(), 1);
  EXPECT_EQ(RunLayer(), want);
  EXPECT_EQ(current(), 1);
  EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
}

TEST_F(EmulatedBackend, DriverThatIsTooOldIsNamed) {
  cuda::DescribeEmulatedDevice("emulated", cuda::Mps::kOff, 11040);
  EXPECT_EQ(
      NewCudaBackend({}).status().message(),
      "cuda: no device: the driver supports CUDA 11.4, want 13.0 or later: update the driver");
  cuda::DescribeEmulatedDevice("emulated", cuda::Mps::kOff, 0);
  EXPECT_EQ(NewCudaBackend({}).status().message(), "cuda: no device: no CUDA driver is installed");
  cuda::DescribeEmulatedDevice("emulated", cuda::Mps::kOff, 13000);
}

TEST_F(EmulatedBackend, ContextOfAnEndedOperationIsUsedAgain) {
  RunLayer();
  const int64_t before = cuda::NumDeviceAllocations();
  cuda_.context.reset();
  auto context = cuda_.backend->NewContext();
  ASSERT_TRUE(context.ok()) << context.status();
  cuda_.context = *std::move(context);
  RunLayer();
  EXPECT_EQ(cuda::NumDeviceAllocations(), before);
}

TEST_F(EmulatedBackend, ManyOpsBetweenTwoWaitsReportTheFirstFault) {
  KvTensor bad(std::vector<float>(2 * 10 * 16, 1.0f), 2, 10, 16, DType::kF32, Layout::kNhd);
  bad.Set(1, 3, 0, std::numeric_limits<float>::infinity());
  const std::unique_ptr<ScoreBuffer> out = cuda_.Buffer(2, 10);
  ASSERT_TRUE(cuda_.backend->RowNorms(*cuda_.context, bad.view(), "first", *out).ok());
  for (int i = 0; i < 100; ++i) {
    ASSERT_TRUE(cuda_.backend->RowNorms(*cuda_.context, bad.view(), "later", *out).ok());
  }
  EXPECT_EQ(cuda_.backend->Wait(*cuda_.context).message(),
            "first: head 1 position 3 is not finite");
  EXPECT_TRUE(cuda_.backend->Wait(*cuda_.context).ok());
}

// A source in host memory of which more is staged than may lie between two waits, so that it would
// be moved before the next task is looked at.
TEST_F(EmulatedBackend, TaskOnAnotherDeviceLetsNoTaskBeforeItMove) {
  constexpr int64_t kRowBytes = 4096;
  constexpr int64_t kTokens = (int64_t{257} << 20) / kRowBytes;
  const std::vector<std::byte> block(16 * kRowBytes, std::byte{1});
  const std::vector<int32_t> block_table(kTokens / 16);  // the one block, again and again
  GatherTask large;
  large.in.data = block.data();
  large.in.size_bytes = static_cast<int64_t>(block.size());
  large.in.dtype = DType::kBF16;
  large.in.num_kv_heads = 1;
  large.in.seq_len = kTokens;
  large.in.head_dim = kRowBytes / 2;
  large.in.head_stride = kRowBytes / 2;
  large.in.token_stride = kRowBytes / 2;
  large.in.block_size = 16;
  large.in.block_stride = 16 * kRowBytes / 2;
  large.in.block_table = block_table;
  const DeviceBytes moved{std::vector<std::byte>(kRowBytes)};
  const DeviceBytes elsewhere{std::vector<std::byte>(kRowBytes)};
  large.out.data = moved.data();
  large.out.size_bytes = kRowBytes;
  large.out.dtype = DType::kBF16;
  large.out.num_kv_heads = 1;
  large.out.seq_len = 1;
  large.out.head_dim = kRowBytes / 2;
  large.out.head_stride = kRowBytes / 2;
  large.out.token_stride = kRowBytes / 2;
  const std::vector<int32_t> set = {5};
  const std::vector<absl::Span<const int32_t>> sets = {set};
  large.keep_indices = sets;
  GatherTask refused = large;
  refused.what = "layer 1";
  refused.out.data = elsewhere.data();
  cuda::PlaceElsewhere(elsewhere.data());
  const absl::Status status =
      cuda_.backend->GatherRowsOfEach(*cuda_.context, std::vector<GatherTask>{large, refused});
  cuda::PlaceElsewhere(nullptr);
  EXPECT_EQ(status, absl::InvalidArgumentError("layer 1: gather: destination: memory of device 1, "
                                               "want host memory or device 0"));
  EXPECT_EQ(moved.Read(), std::vector<std::byte>(kRowBytes));
}

// Window columns of `num_rows` rows in a context of its own; more rows are larger blocks.
absl::Status RunWindow(ComputeBackend& backend, int64_t num_rows) {
  constexpr int64_t kHeads = 4;
  constexpr int64_t kTokens = 80;
  constexpr int64_t kDim = 128;
  std::mt19937 rng(1);
  const DenseTensor q(RandomValues(rng, kHeads * num_rows * kDim, DType::kBF16), kHeads, num_rows,
                      kDim, DType::kBF16);
  const KvTensor k(RandomValues(rng, kTokens * kDim, DType::kBF16), 1, kTokens, kDim, DType::kBF16,
                   Layout::kNhd, 16, 8);
  const DeviceDense device_q(q);
  const DeviceKv device_k(k);
  const std::vector<int64_t> positions = LastPositions(num_rows, kTokens);
  WindowArgs args;
  args.q = device_q.queries();
  args.k = device_k.view();
  args.row_positions = positions;
  args.softmax_scale = 0.1f;
  const std::unique_ptr<OpContext> context = *backend.NewContext();
  const std::unique_ptr<ScoreBuffer> out = *backend.NewBuffer(kHeads, kTokens);
  absl::Status status = backend.WindowColumns(*context, args, *out);
  status.Update(backend.Wait(*context));
  return status;
}

TEST_F(EmulatedBackend, SmallBlocksOfAnotherThreadTakeNoSharedMemoryFromLargeOnes) {
  absl::Status small = absl::UnknownError("did not run");
  cuda::AfterNextSharedLimit([&] {
    std::thread other([&] { small = RunWindow(*cuda_.backend, 16); });
    other.join();
  });
  const absl::Status large = RunWindow(*cuda_.backend, 64);
  EXPECT_TRUE(large.ok()) << large;
  EXPECT_TRUE(small.ok()) << small;
}

TEST(EmulatedDevice, OrdinaryDeviceNeedsNoNote) {
  EXPECT_EQ((*NewCudaBackend({}))->Device().note, "");
}

TEST(EmulatedDevice, SaysWhatItCanComputeAndHold) {
  const DeviceInfo device = (*NewCudaBackend({}))->Device();
  EXPECT_EQ(device.compute_capability, "8.6");
  EXPECT_EQ(device.memory_bytes, int64_t{4} << 30);
}

TEST(EmulatedDevice, WhatIsSpecialIsNoted) {
  cuda::DescribeEmulatedDevice("NVIDIA H100 80GB HBM3 MIG 1g.10gb", cuda::Mps::kOn, 12040);
  const std::string note = (*NewCudaBackend({}))->Device().note;
  cuda::DescribeEmulatedDevice("emulated", cuda::Mps::kOff, 13000);
  EXPECT_NE(note.find("supports CUDA 12.4, keepsetd was built with 13.0"), std::string::npos)
      << note;
  EXPECT_NE(note.find("a MIG instance"), std::string::npos) << note;
  EXPECT_NE(note.find("used through MPS"), std::string::npos) << note;
}

// In a process of its own: the emulated device stays faulted as a real one does.
TEST(EmulatedFault, StickyErrorEndsTheBackend) {
  EXPECT_EXIT(
      {
        auto backend = *NewCudaBackend({});
        auto context = *backend->NewContext();
        cuda::FailNextWait(cudaErrorIllegalAddress);
        const absl::Status status = backend->Wait(*context);
        const bool answers = status.code() == absl::StatusCode::kInternal &&
                             !backend->Health().ok() &&
                             backend->Wait(*context) == backend->Health();
        context.reset();
        backend.reset();
        std::exit(answers ? 0 : 1);
      },
      ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace keepset::kernels
