// Loading cuBLAS, and what becomes of its errors: over the fake library, on the emulator.
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "kernels/compute_backend.h"
#include "kernels/cuda/cublas_file.h"
#include "kernels/cuda/cublas_window.h"
#include "tests/kernels/cuda/cublas_fixture.h"
#include "tests/kernels/cuda/emulated_runtime.h"
#include "tests/kernels/cuda/simt_emulator.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

// As cublas_v2.h numbers them.
constexpr int kNotInitialized = 1;
constexpr int kAllocFailed = 3;
constexpr int kExecutionFailed = 13;
constexpr int kNotSupported = 15;

constexpr char kAsked[] = "cuda: window_kernels=\"cublas\": ";

absl::Status StatusOfBackend(const std::string& library) {
  BackendOptions options = CublasOptions();
  options.cublas_library = library;
  return NewCudaBackend(options).status();
}

TEST(CublasLibrary, MissingFileIsRefusedByName) {
  const absl::Status status = StatusOfBackend("/nowhere/libcublas.so.13");
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()),
              AllOf(StartsWith(kAsked), HasSubstr("/nowhere/libcublas.so.13"),
                    HasSubstr("want cuBLAS 12 or 13 where the dynamic linker looks")));
}

TEST(CublasLibrary, MissingFunctionIsRefusedByName) {
  const absl::Status status = StatusOfBackend(KEEPSET_FAKE_OLD_LIBCUBLAS);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(), std::string(kAsked) + KEEPSET_FAKE_OLD_LIBCUBLAS +
                                  ": no cublasSetWorkspace_v2, want cuBLAS 12 or 13");
}

TEST(CublasLibrary, LibraryThatRefusesTheDeviceIsNamed) {
  TheFakeCublas().create_status = kNotInitialized;
  const absl::Status status = StatusOfBackend(KEEPSET_FAKE_LIBCUBLAS);
  TheFakeCublas().create_status = 0;
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(),
            std::string(kAsked) + KEEPSET_FAKE_LIBCUBLAS +
                ": cublasCreate: CUBLAS_STATUS_NOT_INITIALIZED (1): want a version that the driver "
                "supports");
}

// Where a test of a device is skipped, and where it fails.
TEST(CublasLibrary, OnlyItsAbsenceSkipsTests) {
  BackendOptions options = CublasOptions();
  TheFakeCublas().create_status = kNotInitialized;
  EXPECT_EQ(WhyNoCublas(options), "");
  TheFakeCublas().create_status = 0;
  options.cublas_library = KEEPSET_FAKE_OLD_LIBCUBLAS;
  EXPECT_EQ(WhyNoCublas(options), "");
  options.cublas_library = "/nowhere/libcublas.so.13";
  EXPECT_THAT(WhyNoCublas(options), HasSubstr("/nowhere/libcublas.so.13"));
}

TEST(CublasLibrary, OtherKernelsNeverLoadIt) {
  BackendOptions options;
  options.cublas_library = "/nowhere/libcublas.so.13";
  EXPECT_TRUE(NewCudaBackend(options).ok());
}

// The functions exist under these names where the toolkit's library is at hand.
TEST(CublasLibrary, RealLibraryHasEveryFunction) {
  const auto file = cuda::CublasFile::Load(cuda::CublasFile::Names(""));
  if (!file.ok()) GTEST_SKIP() << file.status().message();
  for (const char* const name :
       {"cublasCreate_v2", "cublasDestroy_v2", "cublasSetStream_v2", "cublasSetWorkspace_v2",
        "cublasSetMathMode", "cublasSetAtomicsMode", "cublasGetStatusString",
        "cublasGemmStridedBatchedEx"}) {
    void (*function)() = nullptr;
    EXPECT_TRUE(file->Find(name, &function).ok()) << name;
  }
}

class CublasErrors : public CublasParity {
 protected:
  void TearDown() override {
    TheFakeCublas().gemm_status = 0;
    CublasParity::TearDown();
  }

  absl::Status StatusWith(int gemm_status) {
    TheFakeCublas().gemm_status = gemm_status;
    const absl::Status status = Columns(Shape(), RandomWindow(Shape(), 2)).status();
    TheFakeCublas().gemm_status = 0;
    return status;
  }
};

TEST_F(CublasErrors, ShapeThatTheLibraryRefusesIsTheCallers) {
  const absl::Status status = StatusWith(kNotSupported);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("cublasGemmStridedBatchedEx: CUBLAS_STATUS_NOT_SUPPORTED (15)"),
                    HasSubstr("bf16 2 x [10, 32] x [77, 32]"),
                    HasSubstr("want window_kernels=\"portable\"")));
}

TEST_F(CublasErrors, MemoryThatTheLibraryLacksIsSaid) {
  EXPECT_EQ(StatusWith(kAllocFailed).code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(CublasErrors, FailedProductEndsTheOperationAlone) {
  const absl::Status status = StatusWith(kExecutionFailed);
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("CUBLAS_STATUS_EXECUTION_FAILED (13)"));
  // That the stream still has work is no error that anybody should find later.
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_TRUE(cuda_.backend->Health().ok());
  ExpectNearOracle({});
}

// In a process of its own: the emulated device stays faulted as a real one does. The library has a
// runtime of its own, so that ours hears of the fault by its next call.
TEST_F(CublasErrors, StickyErrorUnderAProductEndsTheBackend) {
  EXPECT_EXIT(
      {
        const WindowTensors tensors = RandomWindow(Shape(), 2);
        const DeviceDense q(tensors.q);
        const DeviceKv k(tensors.k);
        const std::unique_ptr<ScoreBuffer> out = cuda_.Buffer(4, 77);
        WindowArgs args;
        args.q = q.queries();
        args.k = k.view();
        args.row_positions = tensors.row_positions;
        args.softmax_scale = 1.0f;
        TheFakeCublas().queue = [](cudaStream_t /*stream*/, std::function<void()> /*work*/) {
          cuda::FaultNow(cudaErrorIllegalAddress);
          return cudaErrorIllegalAddress;
        };
        const absl::Status status = cuda_.backend->WindowColumns(*cuda_.context, args, *out);
        const bool is_seen =
            status.code() == absl::StatusCode::kInternal && cuda_.backend->Health() == status;
        std::_Exit(is_seen ? 0 : 1);
      },
      ::testing::ExitedWithCode(0), "");
}

TEST_F(CublasParity, KvHeadsOfALayerShareOneProduct) {
  TheFakeCublas().gemms = 0;
  TheFakeCublas().largest_batch = 0;
  ExpectNearOracle({.num_kv_heads = 6, .reference = Reference::kGiven});
  EXPECT_EQ(TheFakeCublas().gemms, 1);
  EXPECT_EQ(TheFakeCublas().largest_batch, 6);
}

TEST_F(CublasParity, LogitsOfAPromptOfOnePieceAreFormedOnce) {
  TheFakeCublas().gemms = 0;
  ExpectNearOracle({});
  EXPECT_EQ(TheFakeCublas().gemms, 1);
}

TEST_F(CublasParity, LaunchThatFailsIsReported) {
  // Rows, copies of queries and keys, statistics, their end, columns.
  for (int64_t launch = 0; launch < 6; ++launch) {
    const Shape shape = {.layout = Layout::kPaged};
    const WindowTensors tensors = RandomWindow(shape, 2);
    cuda::FailLaunchAfter(launch, cudaErrorInvalidConfiguration);
    EXPECT_EQ(Columns(shape, tensors).status().code(), absl::StatusCode::kInternal) << launch;
  }
  ExpectNearOracle({});
}

TEST_F(CublasParity, OrderOfThreadsDoesNotShow) {
  const Shape shape = {.num_rows = 9, .seq_len = 301, .head_dim = 16, .layout = Layout::kPaged};
  const WindowTensors tensors = RandomWindow(shape, 2);
  const std::vector<float> first = *Columns(shape, tensors);
  for (const uint32_t seed : {2u, 3u, 4u}) {
    cuda::SetEmulationSeed(seed);
    EXPECT_EQ(*Columns(shape, tensors), first) << "seed " << seed;
  }
  cuda::SetEmulationSeed(1);
}

// One handle, two streams: what is queued on one runs when that one is waited for.
TEST_F(CublasParity, ContextsOfOneBackendQueueOnTheirOwnStreams) {
  const Shape shape;
  const WindowTensors tensors[] = {RandomWindow(shape, 2), RandomWindow(shape, 3)};
  const std::vector<float> alone[] = {*Columns(shape, tensors[0]), *Columns(shape, tensors[1])};
  const std::unique_ptr<OpContext> other = *cuda_.backend->NewContext();
  OpContext* const contexts[] = {cuda_.context.get(), other.get()};
  std::vector<std::unique_ptr<ScoreBuffer>> outs;
  for (size_t i = 0; i < 2; ++i) {
    outs.push_back(cuda_.Buffer(shape.num_qo_heads(), shape.seq_len));
    WindowArgs args;
    args.q = tensors[i].q.queries();
    args.k = tensors[i].k.view();
    args.row_positions = tensors[i].row_positions;
    args.softmax_scale = tensors[i].scale;
    ASSERT_TRUE(cuda_.backend->WindowColumns(*contexts[i], args, *outs[i]).ok());
  }
  for (const size_t i : {1, 0}) {
    std::vector<float> values(alone[i].size());
    ASSERT_TRUE(cuda_.backend->CopyToHost(*contexts[i], *outs[i], absl::MakeSpan(values)).ok());
    EXPECT_EQ(values, alone[i]) << i;
  }
}

TEST_F(CublasParity, WarmBackendAllocatesNothing) {
  const Shape shape = {.layout = Layout::kPaged, .memory = Memory::kHost};
  const WindowTensors tensors = RandomWindow(shape, 2);
  ASSERT_TRUE(Columns(shape, tensors).ok());
  const int64_t before = cuda::NumDeviceAllocations();
  ASSERT_TRUE(Columns(shape, tensors).ok());
  EXPECT_EQ(cuda::NumDeviceAllocations(), before);
}

}  // namespace
}  // namespace keepset::kernels
