// keepsetd as it is built, told to compute on a device that is not there, and without being told.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "clients/cpp/client.h"
#include "kernels/backend_registry.h"
#include "tests/integration/child_process.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kExitRefused = 3;
constexpr int kExitFailure = 5;

bool IsBuiltWithCuda() {
  const std::vector<std::string> names = kernels::ListBackends();
  return std::find(names.begin(), names.end(), "cuda") != names.end();
}

class DeviceChoice : public ::testing::Test {
 protected:
  std::string address() const { return absl::StrCat("unix:", directory_.path(), "/k.sock"); }

  void Launch(const std::string& config, const std::string& program = KEEPSETD_BINARY) {
    const std::string file = directory_.path() + "/keepsetd.conf";
    std::ofstream(file) << config;
    process_ = std::make_unique<ChildProcess>(
        std::vector<std::string>{program, "--config", file, "--listen", address(),
                                 "--metrics-listen", "off", "--threads", "1"},
        ChildProcess::Output::kStderr);
  }

  // The line with which a server of `config` complains, and how it ends.
  std::string ComplaintOf(const std::string& config, int* exit_code,
                          const std::string& program = KEEPSETD_BINARY) {
    Launch(config, program);
    std::string line = process_->AwaitLine("keepsetd: ");
    const int status = process_->Wait();
    *exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    return line;
  }

  const TempDir directory_;
  std::unique_ptr<ChildProcess> process_;
};

TEST_F(DeviceChoice, UnknownWindowKernelsAreRefused) {
  if (!IsBuiltWithCuda()) GTEST_SKIP() << "built without CUDA";
  int exit_code = 0;
  EXPECT_EQ(
      ComplaintOf("backend: \"cuda\" window_kernels: \"fastest\"", &exit_code),
      "keepsetd: cuda: window_kernels=\"fastest\", want \"portable\", \"hopper\" or \"cublas\"");
  EXPECT_EQ(exit_code, kExitRefused);
}

TEST_F(DeviceChoice, WindowKernelsOfTheCpuAreRefused) {
  int exit_code = 0;
  EXPECT_EQ(ComplaintOf("window_kernels: \"portable\"", &exit_code),
            "keepsetd: window_kernels=\"portable\", want none with backend cpu");
  EXPECT_EQ(exit_code, kExitRefused);
}

TEST_F(DeviceChoice, DeviceMemoryOfTheCpuIsRefused) {
  int exit_code = 0;
  EXPECT_EQ(ComplaintOf("device_memory_bytes: 1048576", &exit_code),
            "keepsetd: device_memory_bytes=1048576, want none with backend cpu");
  EXPECT_EQ(exit_code, kExitRefused);
}

TEST_F(DeviceChoice, TooLittleDeviceMemoryIsRefused) {
  if (!IsBuiltWithCuda()) GTEST_SKIP() << "built without CUDA";
  int exit_code = 0;
  EXPECT_EQ(ComplaintOf("backend: \"cuda\" device_memory_bytes: 4096", &exit_code),
            "keepsetd: cuda: device_memory_bytes=4096, want 0 or 524288 or more");
  EXPECT_EQ(exit_code, kExitRefused);
}

TEST_F(DeviceChoice, UnknownBackendIsRefused) {
  int exit_code = 0;
  EXPECT_THAT(ComplaintOf("backend: \"abacus\"", &exit_code),
              HasSubstr("backend \"abacus\" is not listed, want one of: "));
  EXPECT_EQ(exit_code, kExitRefused);
}

// A device may appear later: the supervisor tries again after this code.
TEST_F(DeviceChoice, ServerOfAnAbsentDeviceDoesNotStart) {
  if (!IsBuiltWithCuda()) GTEST_SKIP() << "built without CUDA";
  if (kernels::NewBackend("cuda", {}).ok()) GTEST_SKIP() << "there is a device";
  for (const std::string kernels : {"", "portable", "hopper", "cublas"}) {
    const absl::Status status = kernels::NewBackend("cuda", {.window_kernels = kernels}).status();
    if (absl::IsInvalidArgument(status)) continue;  // left out of this build
    int exit_code = 0;
    const std::string config = absl::StrCat("backend: \"cuda\" window_kernels: \"", kernels, "\"");
    EXPECT_THAT(ComplaintOf(config, &exit_code), HasSubstr("keepsetd: cuda: no device: "));
    EXPECT_EQ(exit_code, kExitFailure) << kernels;
  }
}

#ifdef KEEPSET_EMULATED_KEEPSETD
// A keepsetd whose device is there.
TEST_F(DeviceChoice, ServerWithoutTheLibraryOfItsWindowKernelsDoesNotStart) {
  // In front of those that this host may have.
  for (const char* const name : {"/libcublas.so.13", "/libcublas.so.12"}) {
    std::ofstream(directory_.path() + name).flush();
  }
  const char* const before = std::getenv("LD_LIBRARY_PATH");
  const std::string kept = before == nullptr ? "" : before;
  ::setenv("LD_LIBRARY_PATH", directory_.path().c_str(), 1);
  int exit_code = 0;
  const std::string complaint = ComplaintOf("backend: \"cuda\" window_kernels: \"cublas\"",
                                            &exit_code, KEEPSET_EMULATED_KEEPSETD);
  before == nullptr ? ::unsetenv("LD_LIBRARY_PATH") : ::setenv("LD_LIBRARY_PATH", kept.c_str(), 1);
  EXPECT_THAT(complaint,
              AllOf(HasSubstr("keepsetd: cuda: window_kernels=\"cublas\": "),
                    HasSubstr("/libcublas.so.13: file too short"), HasSubstr("want cuBLAS 12")));
  EXPECT_EQ(exit_code, kExitFailure);
}

TEST_F(DeviceChoice, ServerWhoseMemoryDoesNotFitOnTheDeviceDoesNotStart) {
  int exit_code = 0;
  EXPECT_THAT(ComplaintOf("backend: \"cuda\" device_memory_bytes: 2199023255552", &exit_code,
                          KEEPSET_EMULATED_KEEPSETD),
              AllOf(HasSubstr("keepsetd: cuda: "), HasSubstr("2199023255552")));
  EXPECT_EQ(exit_code, kExitFailure);
}

TEST_F(DeviceChoice, ServerWhoseMemoryFitsStarts) {
  Launch("backend: \"cuda\" device_memory_bytes: 1048576", KEEPSET_EMULATED_KEEPSETD);
  EXPECT_THAT(process_->AwaitLine("ready"), HasSubstr("backend=cuda/"));
}
#endif

TEST_F(DeviceChoice, ServerInHostMemorySaysSo) {
  Launch("");
  EXPECT_THAT(process_->AwaitLine("ready"), HasSubstr("backend=cpu/"));
  client::ClientOptions options;
  options.address = address();
  options.transport = client::Transport::kInline;
  const auto client = client::Client::Connect(options);
  ASSERT_TRUE(client.ok()) << client.status();
  const auto info = (*client)->GetServerInfo();
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_THAT(info->device_status, HasSubstr("no device: backend cpu/"));
  EXPECT_TRUE(info->devices.empty());
  EXPECT_THAT(info->transports, ::testing::Not(::testing::Contains("cuda_ipc")));
}

// Device memory handed to a server in host memory is refused with what would be right.
TEST_F(DeviceChoice, DeviceMemoryFitsNoServerInHostMemory) {
  TestServer server;
  WorkerSession worker(server);
  v1::RegisterRegionRequest request;
  request.set_session_id(worker.id());
  request.set_name("kv");
  request.set_kind("cuda_ipc");
  request.set_allocation_bytes(4096);
  request.set_length(4096);
  request.set_access(v1::REGION_ACCESS_READ_ONLY);
  v1::RegisterRegionResponse response;
  const grpc::Status status = worker.stub().RegisterRegion(NewContext().get(), request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("this server has no device, want a server with"));
}

}  // namespace
}  // namespace keepset::integration
