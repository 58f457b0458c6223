// keepsetd, and the driver's count of free memory, for tests of device memory between processes.
#ifndef KEEPSET_TESTS_GPU_DEVICE_IPC_FIXTURE_H_
#define KEEPSET_TESTS_GPU_DEVICE_IPC_FIXTURE_H_

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
    std::ofstream(config) << "backend: \"cuda\" memory { quarantine_seconds: 1 }\n";
    const std::string beside = std::filesystem::path(Program()).parent_path() / "keepsetd";
    server_ = NewProcess({Environment("KEEPSET_KEEPSETD", beside), "--config", config, "--listen",
                          Address(), "--metrics-listen", "off"},
                         integration::ChildProcess::Output::kStderr);
    ASSERT_NE(server_->AwaitLine("ready"), "");
  }

  std::string Address() const { return absl::StrCat("unix:", directory_, "/k.sock"); }
  std::unique_ptr<integration::ChildProcess> Worker(const std::string& phase) const {
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
  std::unique_ptr<integration::ChildProcess> server_;
};

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_DEVICE_IPC_FIXTURE_H_
