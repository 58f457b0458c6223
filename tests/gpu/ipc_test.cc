// Device memory between two processes and a real keepsetd, by both transports: kill -9 of either
// side in each phase gives the memory back, by the driver's own count of free memory.
//
//   gpu_ipc_test                                the tests
//   gpu_ipc_test --worker ADDRESS KIND PHASE    a worker (ipc_worker.h)
//
// KEEPSET_KEEPSETD names the server's program, else keepsetd beside this one. KEEPSET_LAUNCHER:
// words before every program (a dynamic linker with its options; KEEPSET_IPC_TEST names this
// program then). Skips, with the reason, without a device.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "tests/gpu/ipc_driver.h"
#include "tests/gpu/ipc_process.h"
#include "tests/gpu/ipc_worker.h"
#include "tests/integration/child_process.h"

namespace keepset::gpu {
namespace {

using integration::ChildProcess;

// By the kind of memory.
class DeviceIpc : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (const std::string reason = driver_.Open(); !reason.empty()) GTEST_SKIP() << reason;
    std::string name = std::filesystem::temp_directory_path() / "keepset-ipc-XXXXXX";
    ASSERT_NE(::mkdtemp(name.data()), nullptr) << name;
    directory_ = name;
    StartServer();
    // Contexts and pools exist before memory is counted.
    EXPECT_EQ(Worker("whole")->Wait(), 0);
  }
  void TearDown() override {
    server_.reset();
    if (!directory_.empty()) std::filesystem::remove_all(directory_);
  }

  void StartServer() {
    const std::string config = absl::StrCat(directory_, "/keepsetd.conf");
    std::ofstream(config) << "backend: \"cuda\"\n";
    const std::string beside = std::filesystem::path(Program()).parent_path() / "keepsetd";
    server_ = NewProcess({Environment("KEEPSET_KEEPSETD", beside), "--config", config, "--listen",
                          Address(), "--metrics-listen", "off"},
                         ChildProcess::Output::kStderr);
    ASSERT_NE(server_->AwaitLine("ready"), "");
  }

  std::string Address() const { return absl::StrCat("unix:", directory_, "/k.sock"); }
  std::unique_ptr<ChildProcess> Worker(const std::string& phase) const {
    return NewWorker(Address(), GetParam(), phase);
  }

  // kill -9 of a worker in `phase`; the server goes on serving.
  void ExpectMemoryBackFrom(const std::string& phase) {
    const int64_t before = driver_.FreeBytes();
    const auto worker = Worker(phase);
    ASSERT_NE(worker->AwaitLine("ready"), "");
    EXPECT_TRUE(IsTaken(driver_, before));
    worker->Kill();
    EXPECT_TRUE(IsBack(driver_, before))
        << driver_.FreeBytes() << " bytes free, " << before << " before";
    ASSERT_FALSE(server_->HasEnded()) << "wait status " << server_->Wait();
    EXPECT_EQ(Worker("whole")->Wait(), 0);
  }

  Driver driver_;
  std::string directory_;
  std::unique_ptr<ChildProcess> server_;
};

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
    return keepset::gpu::RunIpcWorker(argv[2], argv[3], argv[4]);
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
