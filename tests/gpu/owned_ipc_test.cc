// Device memory of the server's own that a worker has mapped: who dies, who says what, and when the
// driver has the memory back, by its own count.
#include <gtest/gtest.h>

#include <cstdint>
#include <iostream>
#include <string>

#include "tests/gpu/device_ipc_fixture.h"

namespace keepset::gpu {
namespace {

class OwnedDeviceMemory : public DeviceIpc {};

TEST_P(OwnedDeviceMemory, IsZeroTakesRowsBitForBitAndIsFreedByItsRetire) {
  const int64_t before = driver_.FreeBytes();
  const auto worker = Worker("owned_whole");
  EXPECT_EQ(worker->Wait(), 0);
  EXPECT_TRUE(IsBack(driver_, before));
}

TEST_P(OwnedDeviceMemory, OfAKilledWorkerComesBack) { ExpectMemoryBackFrom("owned_mapped"); }

TEST_P(OwnedDeviceMemory, OfAWorkerKilledInAnOperationComesBack) {
  ExpectMemoryBackFrom("owned_calling");
}

TEST_P(OwnedDeviceMemory, OfALostSessionStaysUntilItsProcessHasEnded) {
  const int64_t before = driver_.FreeBytes();
  const auto worker = Worker("owned_lost");
  ASSERT_NE(worker->AwaitLine("ready"), "");
  EXPECT_NE(server_->AwaitLine("until=process_end"), "");
  // Until another one's whole life has passed.
  EXPECT_EQ(Worker("whole")->Wait(), 0);
  EXPECT_TRUE(IsTaken(driver_, before));
  worker->Kill();
  EXPECT_TRUE(IsBack(driver_, before));
}

TEST_P(OwnedDeviceMemory, OfALostSessionIsFreedByTheWorkersWord) {
  const int64_t before = driver_.FreeBytes();
  const auto worker = Worker("owned_word");
  EXPECT_NE(worker->AwaitLine("retired"), "");
  EXPECT_TRUE(IsBack(driver_, before));
  worker->Kill();
}

TEST_P(OwnedDeviceMemory, OfAKilledServerIsLostByATypedErrorAndComesBack) {
  const int64_t before = driver_.FreeBytes();
  const auto worker = Worker("owned_outlive");
  ASSERT_NE(worker->AwaitLine("ready"), "");
  server_->Kill();
  StartServer();
  EXPECT_NE(worker->AwaitLine("lost"), "");
  const std::string end = worker->AwaitLine("over: ");
  EXPECT_NE(end, "");
  std::cout << GetParam() << ": " << end << std::endl;
  worker->Kill();
  EXPECT_TRUE(IsBack(driver_, before));
}

INSTANTIATE_TEST_SUITE_P(EveryKind, OwnedDeviceMemory, ::testing::Values(kByIpc, kByVmm),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace keepset::gpu
