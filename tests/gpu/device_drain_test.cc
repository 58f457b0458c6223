// The end of a server whose device memory workers may have open, over a driver of host memory: the
// loader finds tests/fakes/fake_libcuda.cc as libcuda.so.1.
#include <dlfcn.h>
#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "keepset/v1/session.grpc.pb.h"
#include "kernels/backend_registry.h"
#include "service/server.h"
#include "service/server_config/server_config.h"
#include "tests/gpu/host_device.h"
#include "tests/integration/server_fixture.h"

namespace keepset::gpu {
namespace {

using integration::Eventually;
using integration::NewContext;
using integration::TestDeadline;

constexpr uint64_t kGranule = 2 << 20;

// Mappings that the driver holds in this process.
int DriverMappings() {
  void* const library = ::dlopen("libcuda.so.1", RTLD_NOW);
  return reinterpret_cast<int (*)()>(::dlsym(library, "fake_cuda_mappings"))();
}

// A server and one region of its device memory.
class DeviceDrain : public ::testing::Test {
 protected:
  void SetUp() override {
    auto config = service::ParseServerConfig("metrics_listen: \"off\"", "test");
    auto backend = kernels::NewBackend("cpu", {.num_threads = 1});
    ASSERT_TRUE(config.ok() && backend.ok());
    const std::string address = absl::StrCat("unix:", directory_.path(), "/k.sock");
    config->add_listen(address);
    ASSERT_TRUE(service::ResolveServerConfig(*config).ok());
    auto server = service::Server::Start(
        *config, {.clock = SystemClock(),
                  .log = log_.logger(),
                  .random_seed = 1,
                  .backend = std::make_unique<HostDevice>(*std::move(backend), gate_)});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    sessions_ = v1::SessionService::NewStub(
        grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
    Allocate();
  }

  void Allocate() {
    v1::OpenSessionRequest opening;
    opening.set_client_uuid(std::string(16, 'u'));
    v1::OpenSessionResponse session;
    ASSERT_TRUE(sessions_->OpenSession(NewContext().get(), opening, &session).ok());
    v1::AllocateRegionRequest request;
    request.set_session_id(session.session_id());
    request.set_name("out");
    request.set_kind("cuda_ipc");
    request.set_length(1);
    request.set_device_uuid(fakes::kFakeDeviceUuid);
    v1::AllocateRegionResponse region;
    const grpc::Status status = sessions_->AllocateRegion(NewContext().get(), request, &region);
    ASSERT_TRUE(status.ok()) << status.error_message();
    retire_.set_session_id(session.session_id());
    retire_.set_region_id(region.region_id());
    ASSERT_EQ(server_->exported_device_bytes(), kGranule);
    ASSERT_EQ(DriverMappings(), 1);
  }

  const integration::TempDir directory_;
  integration::CapturedLog log_;
  fakes::Gate gate_;
  std::unique_ptr<service::Server> server_;
  std::unique_ptr<v1::SessionService::Stub> sessions_;
  v1::RetireRegionRequest retire_;
};

TEST_F(DeviceDrain, LastsUntilTheMemoryIsRetired) {
  server_->StartDraining();
  EXPECT_FALSE(server_->WaitIdle(absl::Milliseconds(30)));
  v1::RetireRegionResponse response;
  const grpc::Status status = sessions_->RetireRegion(NewContext().get(), retire_, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_TRUE(server_->WaitIdle(TestDeadline()));
  EXPECT_EQ(DriverMappings(), 0);
}

// Freeing what a worker has open is undefined; whoever ends the process then frees nothing.
TEST_F(DeviceDrain, StoppingLeavesTheMemoryAsItIs) {
  server_->Stop();
  EXPECT_EQ(server_->exported_device_bytes(), kGranule);
  EXPECT_EQ(DriverMappings(), 1);
  server_.reset();
  EXPECT_EQ(DriverMappings(), 0);
}

TEST_F(DeviceDrain, MemoryOfAFailedDeviceIsNotWaitedFor) {
  EXPECT_FALSE(server_->WaitIdle(absl::ZeroDuration()));
  gate_.BreakDevice(absl::InternalError("cuda: illegal address"));
  EXPECT_TRUE(Eventually([&] { return server_->WaitIdle(absl::ZeroDuration()); }));
}

TEST_F(DeviceDrain, NoOtherDeviceGivesMemory) {
  v1::AllocateRegionRequest request;
  request.set_session_id(retire_.session_id());
  request.set_name("elsewhere");
  request.set_kind("cuda_vmm");
  request.set_length(1);
  request.set_device_uuid(fakes::kSecondFakeDeviceUuid);
  v1::AllocateRegionResponse region;
  EXPECT_EQ(sessions_->AllocateRegion(NewContext().get(), request, &region).error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
}

}  // namespace
}  // namespace keepset::gpu
