// The products of window scores on their own: which library they take, whose fault a refusal is,
// and what the fake library forbids.
#include "kernels/cuda/cublas_products.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/kernels/cuda/cublas_fixture.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace keepset::kernels::cuda {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// As cublas_v2.h numbers them.
constexpr int kNotInitialized = 1;
constexpr int kAllocFailed = 3;
constexpr int kInvalidValue = 7;

constexpr int64_t kBatch = 2;
constexpr int64_t kRows = 3;
constexpr int64_t kTokens = 8;
constexpr int64_t kDim = 8;

class CublasProducts : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, 0), cudaSuccess);
  }
  void TearDown() override {
    for (const char* const file : {KEEPSET_FAKE_LIBCUBLAS, KEEPSET_FAKE_OTHER_LIBCUBLAS}) {
      EXPECT_EQ(TheFakeCublas(file).misuse, "");
      EXPECT_EQ(TheFakeCublas(file).handles, 0);
      TheFakeCublas(file) = fakes::FakeCublas();
    }
    EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
  }

  absl::StatusOr<std::unique_ptr<LogitProducts>> New(const std::vector<std::string>& files) {
    return NewCublasProducts(files, health_);
  }

  absl::Status Queue(int64_t logit_stride = kRows * kTokens) {
    const auto products = New({KEEPSET_FAKE_LIBCUBLAS});
    if (!products.ok()) return products.status();
    LogitGemm gemm;
    gemm.keys = keys_.data();
    gemm.key_pitch = gemm.query_pitch = kDim;
    gemm.key_stride = kTokens * kDim;
    gemm.queries = queries_.data();
    gemm.query_stride = kRows * kDim;
    gemm.logits = reinterpret_cast<float*>(logits_.data());
    gemm.logit_pitch = kTokens;
    gemm.logit_stride = logit_stride;
    gemm.num_tokens = kTokens;
    gemm.num_rows = kRows;
    gemm.head_dim = kDim;
    gemm.batch = kBatch;
    const absl::Status status = (*products)->Queue(gemm, workspace_.data(), stream_);
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    return status;
  }

  // What the fake says of the calls so far, which is forgotten.
  static std::string Misuse() { return std::exchange(TheFakeCublas().misuse, std::string()); }

  fakes::FakeCublas& fake_ = TheFakeCublas();
  fakes::FakeCublas& other_ = TheFakeCublas(KEEPSET_FAKE_OTHER_LIBCUBLAS);
  DeviceHealth health_;
  cudaStream_t stream_ = nullptr;
  const DeviceBytes keys_{std::vector<std::byte>(kBatch * kTokens * kDim * 4)};
  const DeviceBytes queries_{std::vector<std::byte>(kBatch * kRows * kDim * 4)};
  const DeviceBytes logits_{std::vector<std::byte>(kBatch * kRows * kTokens * 4)};
  const DeviceBytes workspace_{std::vector<std::byte>(kCublasWorkspaceBytes)};
};

TEST_F(CublasProducts, LibraryThatMakesNoHandleIsFollowedByTheNext) {
  other_.create_status = kNotInitialized;
  const auto products = New({KEEPSET_FAKE_OTHER_LIBCUBLAS, KEEPSET_FAKE_LIBCUBLAS});
  ASSERT_TRUE(products.ok()) << products.status();
  EXPECT_EQ(fake_.handles, 1);
}

TEST_F(CublasProducts, LibraryWithoutAFunctionIsFollowedByTheNext) {
  const auto products = New({KEEPSET_FAKE_OLD_LIBCUBLAS, KEEPSET_FAKE_LIBCUBLAS});
  ASSERT_TRUE(products.ok()) << products.status();
  EXPECT_EQ(fake_.handles, 1);
}

TEST_F(CublasProducts, FirstLibraryThatWorksIsTaken) {
  const auto products = New({KEEPSET_FAKE_LIBCUBLAS, KEEPSET_FAKE_OTHER_LIBCUBLAS});
  ASSERT_TRUE(products.ok()) << products.status();
  EXPECT_EQ(fake_.handles, 1);
  EXPECT_EQ(other_.handles, 0);
}

TEST_F(CublasProducts, EveryLibraryThatDoesNotWorkIsNamed) {
  other_.create_status = kNotInitialized;
  const absl::Status status =
      New({KEEPSET_FAKE_OTHER_LIBCUBLAS, KEEPSET_FAKE_OLD_LIBCUBLAS, "/nowhere/libcublas.so.12"})
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(
      std::string(status.message()),
      AllOf(HasSubstr("cublasCreate: CUBLAS_STATUS_NOT_INITIALIZED (1): want a version that "
                      "the driver supports; "),
            HasSubstr("no cublasSetWorkspace_v2, want cuBLAS 12 or 13; "),
            HasSubstr("/nowhere/libcublas.so.12"),
            HasSubstr(": want cuBLAS 12 or 13 where the dynamic linker looks")));
}

TEST_F(CublasProducts, FullDeviceIsNoWrongVersion) {
  other_.create_status = kAllocFailed;
  const absl::Status status = New({KEEPSET_FAKE_OTHER_LIBCUBLAS, KEEPSET_FAKE_LIBCUBLAS}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(
      std::string(status.message()),
      AllOf(HasSubstr("cublasCreate: CUBLAS_STATUS_ALLOC_FAILED (3): "),
            HasSubstr("want to start before what fills the device"), Not(HasSubstr("version"))));
}

TEST_F(CublasProducts, ValueThatAProductRefusesIsTheCallers) {
  fake_.gemm_status = kInvalidValue;
  const absl::Status status = Queue();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("want window_kernels=\"portable\""));
}

TEST_F(CublasProducts, StreamThatTheLibraryRefusesIsNotTheCallers) {
  fake_.stream_status = kInvalidValue;
  const absl::Status status = Queue();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("cublasSetStream: CUBLAS_STATUS_INVALID_VALUE (7)"),
                    Not(HasSubstr("portable"))));
}

TEST_F(CublasProducts, WorkspaceThatTheLibraryRefusesIsNotTheCallers) {
  fake_.workspace_status = kInvalidValue;
  const absl::Status status = Queue();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("cublasSetWorkspace: CUBLAS_STATUS_INVALID_VALUE (7)"),
                    Not(HasSubstr("portable"))));
}

TEST_F(CublasProducts, EndOnTheirOwnDeviceWhicheverIsCurrent) {
  auto products = New({KEEPSET_FAKE_LIBCUBLAS});
  ASSERT_TRUE(products.ok()) << products.status();
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  products->reset();
  int current = 0;
  EXPECT_EQ(cudaGetDevice(&current), cudaSuccess);
  EXPECT_EQ(current, 1);
  EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
  EXPECT_EQ(Misuse(), "");
}

// Of the fake library: that it would have seen it.
TEST_F(CublasProducts, LogitsOfABatchMustNotOverlap) {
  EXPECT_TRUE(Queue().ok());
  EXPECT_EQ(Misuse(), "");
  EXPECT_TRUE(Queue(kRows * kTokens - 1).ok());
  EXPECT_EQ(Misuse(), "products that overlap");
}

TEST_F(CublasProducts, ProductsWantTheirDevice) {
  const auto products = New({KEEPSET_FAKE_LIBCUBLAS});
  ASSERT_TRUE(products.ok()) << products.status();
  LogitGemm gemm;
  gemm.key_pitch = gemm.query_pitch = gemm.logit_pitch = 1;
  gemm.num_tokens = gemm.num_rows = gemm.head_dim = gemm.batch = 1;
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  EXPECT_FALSE((*products)->Queue(gemm, workspace_.data(), stream_).ok());
  EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
  EXPECT_EQ(Misuse(), "a product on another device");
}

}  // namespace
}  // namespace keepset::kernels::cuda
