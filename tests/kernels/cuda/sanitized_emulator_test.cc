// What the sanitizers find in kernels that the emulator runs.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "gtest/gtest.h"
#include "kernels/compute_backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/row_norm_inl.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/emulated_runtime.h"
#include "tests/kernels/cuda/simt_emulator.h"

namespace keepset::kernels::cuda {
namespace {

// One block of 32 threads with 20 bytes of shared memory.
void RunKernel(const std::function<void(const EmulatedThread&)>& kernel) {
  LaunchShape shape;
  shape.grid_x = shape.grid_y = shape.grid_z = 1;
  shape.threads = 32;
  shape.shared_bytes = 20;
  EmulateGrid(shape, kernel);
}

// Not folded away.
uint32_t Read(const std::byte* data) {
  return *reinterpret_cast<const volatile uint8_t*>(reinterpret_cast<const uint8_t*>(data));
}

class SanitizedEmulatorDeathTest : public CudaTest {};

TEST_F(SanitizedEmulatorDeathTest, SharedMemoryEndsWhereTheLaunchSays) {
  RunKernel([](const EmulatedThread& thread) { Read(thread.shared() + 19); });
  EXPECT_DEATH(RunKernel([](const EmulatedThread& thread) {
                 thread.SyncBlock();
                 if (thread.thread() == 7) Read(thread.shared() + 20);
               }),
               "use-after-poison");
}

TEST_F(SanitizedEmulatorDeathTest, AllocationsEndToTheByte) {
  void* data = nullptr;
  ASSERT_EQ(cudaMalloc(&data, 300), cudaSuccess);
  EXPECT_DEATH(
      RunKernel([data](const EmulatedThread&) { Read(static_cast<std::byte*>(data) + 300); }),
      "use-after-poison");
  EXPECT_EQ(cudaFree(data), cudaSuccess);
}

TEST_F(SanitizedEmulatorDeathTest, BlocksOfThePoolEndWhereTheyWereAskedTo) {
  // Blocks have 512 bytes and more.
  const std::unique_ptr<ScoreBuffer> buffer = cuda_.Buffer(3, 5);
  float values[16];
  EXPECT_DEATH(cudaMemcpy(values, buffer->data(), sizeof(values), cudaMemcpyDeviceToHost),
               "use-after-poison");
}

TEST_F(SanitizedEmulatorDeathTest, LoadsAreAligned) {
  alignas(16) std::byte bytes[64] = {};
  EXPECT_DEATH(RunKernel([&bytes](const EmulatedThread& thread) {
                 const auto* const piece = reinterpret_cast<const Piece*>(bytes + 8);
                 *reinterpret_cast<uint32_t*>(thread.shared()) = thread.LoadOnce(piece).words[0];
               }),
               "misaligned address");
}

}  // namespace
}  // namespace keepset::kernels::cuda
