#include "tests/kernels/cuda/hopper_fixture.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "gtest/gtest.h"
#if defined(KEEPSET_EMULATED_DEVICE)
#include "tests/kernels/cuda/emulated_runtime.h"
#include "tests/kernels/cuda/simt_emulator.h"
#endif

namespace keepset::kernels {
namespace {

bool IsOfAnotherArchitecture(const absl::Status& status) {
  return absl::EndsWith(status.message(), ", want sm_90");
}

}  // namespace

void HopperParity::SetUp() {
#if defined(KEEPSET_EMULATED_DEVICE)
  cuda::SetEmulatedDevice(cuda::EmulatedDevice::kSm90);
#endif
  absl::StatusOr<std::unique_ptr<ComputeBackend>> backend =
      NewCudaBackend({.window_kernels = "hopper"});
  if (!kIsEmulated && (!HasDevice() || IsOfAnotherArchitecture(backend.status()))) {
    GTEST_SKIP() << backend.status().message();
  }
  ASSERT_TRUE(backend.ok()) << backend.status();
  absl::StatusOr<std::unique_ptr<OpContext>> context = (*backend)->NewContext();
  ASSERT_TRUE(context.ok()) << context.status();
  cuda_.backend = *std::move(backend);
  cuda_.context = *std::move(context);
  cpu_.backend = CpuBackend();
  context = cpu_.backend->NewContext();
  ASSERT_TRUE(context.ok()) << context.status();
  cpu_.context = *std::move(context);
}
void HopperParity::TearDown() {
  cuda_.context.reset();
  cuda_.backend.reset();
#if defined(KEEPSET_EMULATED_DEVICE)
  cuda::SetEmulationSeed(1);
  cuda::SetEmulatedDevice(cuda::EmulatedDevice::kSm86);
#endif
}

absl::StatusOr<std::vector<float>> HopperParity::Columns(const WindowCase& shape,
                                                         const WindowTensors& tensors,
                                                         const DenseTensor* lse,
                                                         std::vector<float>* norms) {
  absl::StatusOr<std::vector<float>> columns = WindowColumnsOn(cuda_, shape, tensors, lse, norms);
  name_ = cuda_.backend->NameFor(*cuda_.context);
  return columns;
}

void HopperParity::ExpectNearOracle(const WindowCase& shape, const std::string& name) {
  const WindowTensors tensors = RandomWindow(shape, 11);
  const Attention attention = AttentionOf(tensors);
  const std::optional<DenseTensor> lse = GivenLse(shape, attention);
  const absl::StatusOr<std::vector<float>> columns =
      Columns(shape, tensors, lse.has_value() ? &*lse : nullptr);
  ASSERT_TRUE(columns.ok()) << columns.status();
  EXPECT_EQ(name_, name);
  ExpectNear(*columns, shape, attention);
}

void HopperParity::ExpectNormsNearCpu(const WindowCase& shape, const WindowTensors& tensors) {
  // fp32 sums of up to 256 squares in another order.
  constexpr float kRelative = 1e-5f;
  std::vector<float> norms;
  const absl::StatusOr<std::vector<float>> columns = Columns(shape, tensors, nullptr, &norms);
  ASSERT_TRUE(columns.ok()) << columns.status();
  EXPECT_EQ(name_, kByHopper);
  const std::unique_ptr<ScoreBuffer> twin = cpu_.Buffer(shape.num_kv_heads, shape.seq_len);
  ASSERT_TRUE(cpu_.backend->RowNorms(*cpu_.context, tensors.v.view(), "v", *twin).ok());
  const std::vector<float> want = cpu_.Values(*twin);
  ASSERT_EQ(norms.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(norms[i], want[i], kRelative * want[i]) << i;
}

}  // namespace keepset::kernels
