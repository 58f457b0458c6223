// Device memory between two processes and a real keepsetd, by both transports: kill -9 of either
// side in each phase gives the memory back, by the driver's own count of free memory.
//
//   gpu_ipc_test                                the tests
//   gpu_ipc_test --worker ADDRESS KIND PHASE    a worker (ipc_worker.h, owned_worker.h)
//
// KEEPSET_KEEPSETD names the server's program, else keepsetd beside this one. KEEPSET_LAUNCHER:
// words before every program (a dynamic linker with its options; KEEPSET_IPC_TEST names this
// program then). Skips, with the reason, without a device.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "absl/strings/match.h"
#include "tests/gpu/device_ipc_fixture.h"
#include "tests/gpu/ipc_driver.h"
#include "tests/gpu/ipc_process.h"
#include "tests/gpu/ipc_worker.h"
#include "tests/gpu/owned_worker.h"

namespace keepset::gpu {
namespace {

TEST_P(DeviceIpc, AWorkerKilledAfterItsExportGivesItsMemoryBack) {
  ExpectMemoryBackFrom("exported");
}

TEST_P(DeviceIpc, AWorkerKilledAfterItsRegistrationGivesItsMemoryBack) {
  ExpectMemoryBackFrom("registered");
}

TEST_P(DeviceIpc, AWorkerKilledInAnOperationGivesItsMemoryBack) {
  ExpectMemoryBackFrom("compressing");
}

TEST_P(DeviceIpc, AWorkerKilledAfterAnOperationGivesItsMemoryBack) {
  ExpectMemoryBackFrom("compressed");
}

TEST_P(DeviceIpc, AWorkerKilledWhileItRetiresGivesItsMemoryBack) {
  ExpectMemoryBackFrom("retiring");
}

TEST_P(DeviceIpc, AKilledServerHoldsNothingOfAWorker) {
  const int64_t before = driver_.FreeBytes();
  const auto worker = Worker("outlive");
  ASSERT_NE(worker->AwaitLine("ready"), "");
  EXPECT_TRUE(IsTaken(driver_, before));
  server_->Kill();
  // Freed while the worker lives, by its own count.
  EXPECT_NE(worker->AwaitLine("freed"), "");
  worker->Kill();
  EXPECT_TRUE(IsBack(driver_, before));
}

TEST_P(DeviceIpc, AServerKilledInAnOperationHoldsNothingOfAWorker) {
  const int64_t before = driver_.FreeBytes();
  const auto worker = Worker("outlive_call");
  ASSERT_NE(worker->AwaitLine("ready"), "");
  server_->Kill();
  EXPECT_NE(worker->AwaitLine("freed"), "");
  worker->Kill();
  EXPECT_TRUE(IsBack(driver_, before));
}

TEST_P(DeviceIpc, AWorkerGoesOnWithTheServerAfterAKilledOne) {
  const int64_t before = driver_.FreeBytes();
  const auto worker = Worker("reopening");
  ASSERT_NE(worker->AwaitLine("ready"), "");
  server_->Kill();
  ASSERT_NE(worker->AwaitLine("alone"), "");
  StartServer();
  EXPECT_NE(worker->AwaitLine("again"), "");
  EXPECT_TRUE(IsTaken(driver_, before));
  worker->Kill();
  EXPECT_TRUE(IsBack(driver_, before));
}

INSTANTIATE_TEST_SUITE_P(EveryKind, DeviceIpc, ::testing::Values(kByIpc, kByVmm),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace keepset::gpu

int main(int argc, char** argv) {
  if (argc == 5 && std::string(argv[1]) == "--worker") {
    return absl::StartsWith(argv[4], "owned_")
               ? keepset::gpu::RunOwnedWorker(argv[2], argv[3], argv[4])
               : keepset::gpu::RunIpcWorker(argv[2], argv[3], argv[4]);
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
