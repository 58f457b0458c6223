#include "kernels/backend_registry.h"

#include <memory>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/fma_peak.h"

namespace keepset::kernels {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::StartsWith;

TEST(BackendRegistry, ListsTheCpuBackend) { EXPECT_THAT(ListBackends(), Contains("cpu")); }

TEST(BackendRegistry, CpuBackendNamesItsTarget) {
  absl::StatusOr<std::unique_ptr<ComputeBackend>> backend = NewBackend("cpu", {});
  ASSERT_TRUE(backend.ok()) << backend.status();
  EXPECT_THAT((*backend)->name(), StartsWith("cpu/"));
}

TEST(BackendRegistry, UnlistedNameIsNotFoundAndListsTheNames) {
  const absl::Status status = NewBackend("abacus", {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("cpu"));
}

TEST(BackendRegistry, NegativeThreadCountIsRefused) {
  BackendOptions options;
  options.num_threads = -1;
  EXPECT_EQ(NewBackend("cpu", options).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(FmaPeak, RatesArePositive) {
  EXPECT_GT(MeasureFmaPeakGflops(1), 0.0);
  EXPECT_GT(MeasureLogitsGflops(1, 10, 48), 0.0);
}

TEST(BackendRegistry, WindowKernelsAreOfAGpu) {
  const absl::Status status = NewBackend("cpu", {.window_kernels = "hopper"}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "window_kernels=\"hopper\", want none with backend cpu");
}

}  // namespace
}  // namespace keepset::kernels
