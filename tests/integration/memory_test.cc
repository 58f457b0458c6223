#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kBudget = 24;

TEST(SessionMemory, RegionOfAnotherSessionIsNotFound) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession owner(server);
  WorkerSession other(server);
  WorkerSession::Region region = owner.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  const grpc::Status status =
      Compress(server, ToRegion(WireRequest(prompt, "tova", kBudget), other.id(), region), nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST(SessionMemory, UnknownSessionIsNotFound) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  request.mutable_spec()->set_session_id("no-such-session");
  EXPECT_EQ(Compress(server, request, nullptr).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST(SessionMemory, SliceWithoutASessionIsRefused) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession session(server);
  WorkerSession::Region region = session.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  const grpc::Status status =
      Compress(server, ToRegion(WireRequest(prompt, "tova", kBudget), "", region), nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("session_id"));
}

TEST(SessionMemory, SliceBeyondTheRegionIsRefused) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession session(server);
  WorkerSession::Region region = session.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  v1::CompressRequest request =
      ToRegion(WireRequest(prompt, "tova", kBudget), session.id(), region);
  v1::RegionSlice* slice = request.mutable_layers(0)->mutable_k()->mutable_data()->mutable_region();
  slice->set_offset(~uint64_t{0} - 15);  // offset + length wraps around
  const grpc::Status status = Compress(server, request, nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("layer 0: k"));
}

TEST(SessionMemory, UnalignedSliceIsRefused) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession session(server);
  WorkerSession::Region region = session.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  v1::CompressRequest request =
      ToRegion(WireRequest(prompt, "tova", kBudget), session.id(), region);
  request.mutable_layers(0)->mutable_k()->mutable_data()->mutable_region()->set_offset(2);
  const grpc::Status status = Compress(server, request, nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("multiple of 4"));
}

// A request whose destinations lie in `region`, one after the other from `offset`.
void AddDestinations(v1::CompressRequest& request, const fakes::SyntheticPrompt& prompt,
                     const WorkerSession::Region& region, uint64_t offset, uint64_t capacity) {
  request.mutable_spec()->set_gather(v1::GATHER_DESTINATION);
  const uint64_t bytes = prompt.shape().num_kv_heads * capacity * prompt.shape().head_dim * 4;
  for (v1::LayerInput& layer : *request.mutable_layers()) {
    layer.mutable_destination()->set_capacity_tokens(capacity);
    for (v1::KvTensor* tensor :
         {layer.mutable_destination()->mutable_k(), layer.mutable_destination()->mutable_v()}) {
      tensor->set_dtype(v1::DTYPE_F32);
      v1::RegionSlice* slice = tensor->mutable_data()->mutable_region();
      slice->set_region_id(region.id);
      slice->set_offset(offset);
      slice->set_length(bytes);
      offset += bytes;
    }
  }
}

TEST(SessionMemory, ReadOnlyDestinationIsRefused) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession session(server);
  WorkerSession::Region region = session.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  v1::CompressRequest request =
      ToRegion(WireRequest(prompt, "tova", kBudget), session.id(), region);
  AddDestinations(request, prompt, region, 1 << 19, kBudget);
  const grpc::Status status = Compress(server, request, nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("read-write"));
}

TEST(SessionMemory, DestinationOverItsSourceIsRefused) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession session(server);
  WorkerSession::Region region = session.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_WRITE);
  v1::CompressRequest request =
      ToRegion(WireRequest(prompt, "tova", kBudget), session.id(), region);
  AddDestinations(request, prompt, region, 4096, kBudget);
  const grpc::Status status = Compress(server, request, nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("disjoint"));
}

TEST(SessionMemory, DestinationSmallerThanTheKeepSetIsRefused) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession session(server);
  WorkerSession::Region region = session.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_WRITE);
  v1::CompressRequest request =
      ToRegion(WireRequest(prompt, "tova", kBudget), session.id(), region);
  AddDestinations(request, prompt, region, 1 << 19, kBudget - 1);
  const grpc::Status status = Compress(server, request, nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("want 24"));
}

TEST(SessionMemory, RetireWaitsForTheOperationThatUsesTheRegion) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession session(server);
  WorkerSession::Region region = session.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  const v1::CompressRequest request =
      ToRegion(WireRequest(prompt, "tova", kBudget), session.id(), region);
  WorkerStream stream(server);
  stream.Begin(1, request.spec());
  stream.Layer(1, request.layers(0));
  ASSERT_TRUE(Eventually([&] { return session.List().regions(0).leases() == 1; }));
  EXPECT_EQ(session.Retire(region.id, 1).error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  stream.Cancel(1);
  EXPECT_TRUE(session.Retire(region.id, 30000).ok());
}

TEST(SessionMemory, UnsealedMemfdIsRefused) {
  TestServer server;
  WorkerSession session(server);
  const service::UniqueFd fd(::memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(::ftruncate(fd.get(), 4096), 0);
  v1::RegisterRegionRequest request;
  request.set_session_id(session.id());
  request.set_name("unsealed");
  request.set_kind("memfd");
  request.set_fd_token(session.PassFd(fd.get()));
  request.set_allocation_bytes(4096);
  request.set_length(4096);
  request.set_access(v1::REGION_ACCESS_READ_ONLY);
  v1::RegisterRegionResponse response;
  const grpc::Status status = session.stub().RegisterRegion(NewContext().get(), request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("seal"));
}

TEST(SessionMemory, UnknownAccessIsRefused) {
  TestServer server;
  WorkerSession session(server);
  v1::RegisterRegionRequest request;
  request.set_session_id(session.id());
  request.set_name("kv");
  request.set_kind("memfd");
  v1::RegisterRegionResponse response;
  const grpc::Status status = session.stub().RegisterRegion(NewContext().get(), request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("access=0"));
}

TEST(SessionMemory, HangUpEndsTheSession) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession session(server);
  session.HangUp();
  v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  request.mutable_spec()->set_session_id(session.id());
  EXPECT_TRUE(Eventually([&] {
    return Compress(server, request, nullptr).error_code() == grpc::StatusCode::NOT_FOUND;
  }));
  EXPECT_TRUE(server.log().AwaitLine({"session_ended", "why=hang_up"}));
}

TEST(SessionMemory, ClosedSessionIsUnknown) {
  TestServer server;
  WorkerSession session(server);
  v1::CloseSessionRequest request;
  request.set_session_id(session.id());
  v1::CloseSessionResponse response;
  ASSERT_TRUE(session.stub().CloseSession(NewContext().get(), request, &response).ok());
  EXPECT_EQ(session.stub().CloseSession(NewContext().get(), request, &response).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

}  // namespace
}  // namespace keepset::integration
