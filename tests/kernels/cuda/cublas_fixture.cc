#include "tests/kernels/cuda/cublas_fixture.h"

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/cublas_file.h"
#include "kernels/cuda/cublas_products.h"
#if defined(KEEPSET_EMULATED_DEVICE)
#include <dlfcn.h>

#include "base/check.h"
#include "tests/kernels/cuda/emulated_runtime.h"
#endif

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

#if defined(KEEPSET_EMULATED_DEVICE)
fakes::FakeCublas& TheFakeCublas(const char* file) {
  void* const library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
  KEEPSET_CHECK(library != nullptr);
  auto* const control =
      reinterpret_cast<fakes::FakeCublas* (*)()>(dlsym(library, "FakeCublasControl"));
  KEEPSET_CHECK(control != nullptr);
  fakes::FakeCublas& fake = *control();
  fake.queue = &cuda::QueueEmulated;
  fake.current_device = [] {
    int device = 0;
    KEEPSET_CHECK(cudaGetDevice(&device) == cudaSuccess);
    return device;
  };
  return fake;
}
#endif

BackendOptions CublasOptions() {
  BackendOptions options;
  options.window_kernels = "cublas";
#if defined(KEEPSET_EMULATED_DEVICE)
  TheFakeCublas();
  options.cublas_library = KEEPSET_FAKE_LIBCUBLAS;
#endif
  return options;
}

std::string WhyNoCublas(const BackendOptions& options) {
  absl::Status status = cuda::CheckCublasIsBuilt();
  if (status.ok()) {
    status = cuda::CublasFile::Load(cuda::CublasFile::Names(options.cublas_library)).status();
  }
  return std::string(status.message());
}

void CublasParity::SetUp() {
  CudaTest::SetUp();
  if (IsSkipped()) return;
  cuda_.context.reset();
  const BackendOptions options = CublasOptions();
  const std::string absent = WhyNoCublas(options);
  if (!absent.empty()) GTEST_SKIP() << absent;
  absl::StatusOr<std::unique_ptr<ComputeBackend>> backend = NewCudaBackend(options);
  ASSERT_TRUE(backend.ok()) << backend.status();
  cuda_.backend = *std::move(backend);
  absl::StatusOr<std::unique_ptr<OpContext>> context = cuda_.backend->NewContext();
  ASSERT_TRUE(context.ok()) << context.status();
  cuda_.context = *std::move(context);
}

void CublasParity::TearDown() {
  cuda_.context.reset();
  cuda_.backend.reset();
#if defined(KEEPSET_EMULATED_DEVICE)
  EXPECT_EQ(TheFakeCublas().misuse, "");
  EXPECT_EQ(TheFakeCublas().handles, 0);
#endif
}

absl::StatusOr<std::vector<float>> CublasParity::Columns(const Shape& shape,
                                                         const WindowTensors& tensors,
                                                         const DenseTensor* lse,
                                                         std::vector<float>* norms) {
  absl::StatusOr<std::vector<float>> columns = WindowColumnsOn(cuda_, shape, tensors, lse, norms);
  name_ = cuda_.backend->NameFor(*cuda_.context);
  return columns;
}

void CublasParity::ExpectNearOracle(const Shape& shape) {
  const WindowTensors tensors = RandomWindow(shape, 11);
  const Attention attention = AttentionOf(tensors);
  const std::optional<DenseTensor> lse = GivenLse(shape, attention);
  const absl::StatusOr<std::vector<float>> columns =
      Columns(shape, tensors, lse.has_value() ? &*lse : nullptr);
  ASSERT_TRUE(columns.ok()) << columns.status();
  EXPECT_THAT(name_, ::testing::EndsWith("/cublas"));
  ExpectNear(*columns, shape, attention);
}

void CublasParity::ExpectValueNorms(const Shape& shape) {
  const WindowTensors tensors = RandomWindow(shape, 5);
  std::vector<float> norms;
  ASSERT_TRUE(Columns(shape, tensors, nullptr, &norms).ok());
  const std::unique_ptr<ScoreBuffer> twin = cpu_.Buffer(shape.num_kv_heads, shape.seq_len);
  ASSERT_TRUE(cpu_.backend->RowNorms(*cpu_.context, tensors.v.view(), "v", *twin).ok());
  const std::vector<float> want = cpu_.Values(*twin);
  for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(norms[i], want[i], 1e-5f * want[i]) << i;
}

}  // namespace keepset::kernels
