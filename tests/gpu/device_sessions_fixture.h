// The transports of device memory in this process, for tests of what a driver makes of memory that
// other processes announce.
#ifndef KEEPSET_TESTS_GPU_DEVICE_SESSIONS_FIXTURE_H_
#define KEEPSET_TESTS_GPU_DEVICE_SESSIONS_FIXTURE_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "base/clock.h"
#include "clients/cpp/device_memory.h"
#include "service/memory/session_manager.h"
#include "tests/gpu/ipc_driver.h"
#include "tests/integration/child_process.h"

namespace keepset::gpu {

inline constexpr char kNoServer[] = "-";
inline constexpr uint64_t kPiece = uint64_t{1} << 20;

// Sessions of this process with the transports of device memory, and exporters in others.
class DeviceSessions : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = driver_.Open(); !reason.empty()) GTEST_SKIP() << reason;
    sessions_ =
        service::SessionManager::New({}, service::NewBuiltinTransports([](absl::string_view kind) {
                                       return kind == kByIpc || kind == kByVmm;
                                     }),
                                     SystemClock(), nullptr);
    service::OpenSessionArgs opening;
    opening.client_uuid = std::string(16, 'u');
    const auto session = sessions_->OpenSession(opening);
    ASSERT_TRUE(session.ok()) << session.status();
    session_ = session->session_id;
  }

  // What a worker of its own process says of its memory.
  static service::RegionDescriptor HandleOf(integration::ChildProcess& exporter) {
    const std::vector<std::string> words = absl::StrSplit(exporter.AwaitLine("handle "), ' ');
    service::RegionDescriptor region;
    if (words.size() != 5) {
      ADD_FAILURE() << "the exporter says nothing";
      return region;
    }
    region.kind = kByIpc;
    region.ipc_handle = absl::HexStringToBytes(words[1]);
    region.length = kPiece;
    region.device_uuid = words[3];
    EXPECT_TRUE(absl::SimpleAtoi(words[2], &region.allocation_bytes));
    EXPECT_TRUE(absl::SimpleAtoi(words[4], &region.generation));
    return region;
  }

  static service::RegionDescriptor DescriptorOf(const client::DeviceRegion& exported) {
    service::RegionDescriptor region;
    region.kind = exported.kind();
    region.ipc_handle = exported.ipc_handle();
    region.allocation_bytes = exported.allocation_bytes();
    region.length = kPiece;
    region.device_uuid = exported.device_uuid();
    region.generation = exported.generation();
    return region;
  }

  // With its identifier in region_id_ when it is registered.
  absl::Status Register(const std::string& name, service::RegionDescriptor region, int fd = -1) {
    uint64_t token = 0;
    if (fd >= 0) {
      const auto deposited = sessions_->DepositFd(session_, service::UniqueFd(::dup(fd)));
      if (!deposited.ok()) return deposited.status();
      token = *deposited;
    }
    const auto registered = sessions_->RegisterRegion(session_, name, token, std::move(region));
    if (registered.ok()) region_id_ = registered->region_id;
    return registered.status();
  }

  // What drivers call the same mistake is not one code.
  static void ExpectDriverRefusal(const char* what, const absl::Status& status) {
    EXPECT_TRUE(absl::IsInvalidArgument(status) || absl::IsFailedPrecondition(status))
        << what << ": " << status;
    std::cout << what << ": " << status << std::endl;
  }

  uint64_t MappedBytes() const {
    uint64_t bytes = 0;
    for (const auto& kind : sessions_->Counts().regions) bytes += kind.device_bytes;
    return bytes;
  }

  Driver driver_;
  std::unique_ptr<service::SessionManager> sessions_;
  std::string session_;
  std::string region_id_;
};

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_DEVICE_SESSIONS_FIXTURE_H_
