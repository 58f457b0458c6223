#include "tests/gpu/bench_device.h"

#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "tests/gpu/bench_machine.h"
#include "tests/gpu/selection_bench.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

}  // namespace keepset::kernels

namespace keepset::gpu {
namespace {

class BenchDevice : public ::testing::Test {
 protected:
  nlohmann::json LineOf(const std::function<void(const BenchMachine&)>& bench) {
    ::testing::internal::CaptureStdout();
    bench(machine_);
    return nlohmann::json::parse(::testing::internal::GetCapturedStdout());
  }

  const std::unique_ptr<kernels::ComputeBackend> backend_ = *kernels::NewCudaBackend({});
  const Ceilings ceilings_ = {1000.0, 1.0, 1.0, 1.0, ""};
  const BenchMachine machine_ = {*backend_, ceilings_, 3};
};

// The emulated clock counts kernels: neither the preparations of a measurement nor copies.
TEST_F(BenchDevice, SelectionIsTheKernelAlone) {
  const nlohmann::json line =
      LineOf([](const BenchMachine& machine) { BenchSelect(machine, 3, 300, 17); });
  EXPECT_EQ(line["device_ms"], 1.0);
  EXPECT_EQ(line["device_ms_p99"], 1.0);
  EXPECT_EQ(line["device_us"], 1000.0);
  EXPECT_EQ(line["repetitions"], 3);
  EXPECT_EQ(line["host_ahead"], 1.0);
  EXPECT_EQ(line["allocated_bytes"], 0);
}

TEST_F(BenchDevice, GatherOfAllLayersIsOneKernel) {
  const nlohmann::json line =
      LineOf([](const BenchMachine& machine) { BenchGather(machine, 2, 100, 16); });
  EXPECT_EQ(line["device_ms"], 1.0);
  // K and V of two layers, 16 rows of 8 heads of 256 bytes, read and written, in a millisecond.
  EXPECT_DOUBLE_EQ(line["gb_per_s"].get<double>(), 4.0 * 16 * 8 * 256 * 2 / 1e6);
  EXPECT_DOUBLE_EQ(line["share_of_copy"].get<double>(), line["gb_per_s"].get<double>() / 1000.0);
}

TEST_F(BenchDevice, WorkThatWaitsIsSeen) {
  const auto context = NewContext(machine_);
  DeviceTimer timer(StreamOf(*context));
  const auto wait = [&] { Require(backend_->Wait(*context)); };
  EXPECT_EQ(timer.Measure(5, wait, wait).host_ahead, 0);
  EXPECT_EQ(timer
                .Measure(
                    5, [] {}, wait)
                .host_ahead,
            5);
}

TEST_F(BenchDevice, WorkThatAllocatesIsSeen) {
  const auto context = NewContext(machine_);
  DeviceTimer timer(StreamOf(*context));
  std::vector<std::unique_ptr<DeviceMemory>> taken;
  const DeviceTimes times = timer.Measure(
      4, [&] { taken.push_back(std::make_unique<DeviceMemory>(1)); },
      [&] { Require(backend_->Wait(*context)); });
  EXPECT_EQ(times.allocated_bytes, 4);
}

TEST(FillRandom, RepeatsWhatItFilled) {
  constexpr int64_t kBytes = (int64_t{4} << 20) + 6;
  const DeviceMemory memory(kBytes);
  FillRandom(memory.data(), kBytes, 1);
  EXPECT_EQ(std::vector(memory.data(), memory.data() + 6),
            std::vector(memory.data() + kBytes - 6, memory.data() + kBytes));
}

}  // namespace
}  // namespace keepset::gpu
