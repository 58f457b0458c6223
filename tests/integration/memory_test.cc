#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <thread>

#include "absl/synchronization/notification.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kBudget = 24;

// A server, a session of it, and a prompt that may be laid into the session's memory.
class SessionMemory : public ::testing::Test {
 protected:
  // The prompt's tensors in region_, which is registered anew.
  v1::CompressRequest InRegion(v1::RegionAccess access) {
    region_ = session_.Register("kv", 1 << 20, access);
    return ToRegion(WireRequest(prompt_, "tova", kBudget), session_.id(), region_);
  }

  // Destinations of all layers in region_, one after the other from `offset`.
  void AddDestinations(v1::CompressRequest& request, uint64_t offset, uint64_t capacity) const {
    request.mutable_spec()->set_gather(v1::GATHER_DESTINATION);
    const uint64_t bytes = prompt_.shape().num_kv_heads * capacity * prompt_.shape().head_dim * 4;
    for (v1::LayerInput& layer : *request.mutable_layers()) {
      layer.mutable_destination()->set_capacity_tokens(capacity);
      for (v1::KvTensor* tensor :
           {layer.mutable_destination()->mutable_k(), layer.mutable_destination()->mutable_v()}) {
        tensor->set_dtype(v1::DTYPE_F32);
        v1::RegionSlice* slice = tensor->mutable_data()->mutable_region();
        slice->set_region_id(region_.id);
        slice->set_offset(offset);
        slice->set_length(bytes);
        offset += bytes;
      }
    }
  }

  void ExpectRefused(const v1::CompressRequest& request, grpc::StatusCode code,
                     const std::string& message) {
    const grpc::Status status = Compress(server_, request, nullptr);
    EXPECT_EQ(status.error_code(), code);
    EXPECT_THAT(status.error_message(), HasSubstr(message));
  }

  TestServer server_;
  const fakes::SyntheticPrompt prompt_{{}};
  WorkerSession session_{server_};
  WorkerSession::Region region_;
};

TEST_F(SessionMemory, RegionOfAnotherSessionIsNotFound) {
  v1::CompressRequest request = InRegion(v1::REGION_ACCESS_READ_ONLY);
  const WorkerSession other(server_);
  request.mutable_spec()->set_session_id(other.id());
  EXPECT_EQ(Compress(server_, request, nullptr).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(SessionMemory, UnknownSessionIsNotFound) {
  v1::CompressRequest request = WireRequest(prompt_, "tova", kBudget);
  request.mutable_spec()->set_session_id("no-such-session");
  EXPECT_EQ(Compress(server_, request, nullptr).error_code(), grpc::StatusCode::NOT_FOUND);
}

// As when a client dies: its session is gone while its last call comes in and is cancelled.
TEST_F(SessionMemory, CallOfAGoneSessionThatIsCancelledIsAnsweredOnce) {
  v1::CompressRequest request = WireRequest(prompt_, "tova", kBudget);
  request.mutable_spec()->set_session_id("no-such-session");
  const auto stub = server_.compression();
  for (int round = 0; round < 300; ++round) {
    const auto context = NewContext();
    v1::CompressResponse response;
    absl::Notification done;
    stub->async()->Compress(context.get(), &request, &response, [&](grpc::Status status) {
      EXPECT_FALSE(status.ok());
      done.Notify();
    });
    for (int spin = 0; spin < round * 4; ++spin) std::this_thread::yield();
    context->TryCancel();
    done.WaitForNotification();
  }
  EXPECT_EQ(Compress(server_, request, nullptr).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(SessionMemory, SliceWithoutASessionIsRefused) {
  v1::CompressRequest request = InRegion(v1::REGION_ACCESS_READ_ONLY);
  request.mutable_spec()->clear_session_id();
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, "session_id");
}

TEST_F(SessionMemory, SliceBeyondTheRegionIsRefused) {
  v1::CompressRequest request = InRegion(v1::REGION_ACCESS_READ_ONLY);
  v1::RegionSlice* slice = request.mutable_layers(0)->mutable_k()->mutable_data()->mutable_region();
  slice->set_offset(~uint64_t{0} - 15);  // offset + length wraps around
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, "layer 0: k");
}

TEST_F(SessionMemory, UnalignedSliceIsRefused) {
  v1::CompressRequest request = InRegion(v1::REGION_ACCESS_READ_ONLY);
  request.mutable_layers(0)->mutable_k()->mutable_data()->mutable_region()->set_offset(2);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, "multiple of 4");
}

TEST_F(SessionMemory, ReadOnlyDestinationIsRefused) {
  v1::CompressRequest request = InRegion(v1::REGION_ACCESS_READ_ONLY);
  AddDestinations(request, 1 << 19, kBudget);
  ExpectRefused(request, grpc::StatusCode::FAILED_PRECONDITION, "read-write");
}

TEST_F(SessionMemory, DestinationOverItsSourceIsRefused) {
  v1::CompressRequest request = InRegion(v1::REGION_ACCESS_READ_WRITE);
  AddDestinations(request, 4096, kBudget);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, "disjoint");
}

TEST_F(SessionMemory, DestinationSmallerThanTheKeepSetIsRefused) {
  v1::CompressRequest request = InRegion(v1::REGION_ACCESS_READ_WRITE);
  AddDestinations(request, 1 << 19, kBudget - 1);
  ExpectRefused(request, grpc::StatusCode::FAILED_PRECONDITION, "want 24");
}

TEST_F(SessionMemory, RetireWaitsForTheOperationThatUsesTheRegion) {
  const v1::CompressRequest request = InRegion(v1::REGION_ACCESS_READ_ONLY);
  WorkerStream stream(server_);
  stream.Begin(1, request.spec());
  stream.Layer(1, request.layers(0));
  ASSERT_TRUE(Eventually([&] { return session_.List().regions(0).leases() == 1; }));
  EXPECT_EQ(session_.Retire(region_.id, 1).error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  stream.Cancel(1);
  EXPECT_TRUE(session_.Retire(region_.id, 30000).ok());
}

TEST_F(SessionMemory, UnsealedMemfdIsRefused) {
  const service::UniqueFd fd(::memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(::ftruncate(fd.get(), 4096), 0);
  v1::RegisterRegionRequest request;
  request.set_session_id(session_.id());
  request.set_name("unsealed");
  request.set_kind("memfd");
  request.set_fd_token(session_.PassFd(fd.get()));
  request.set_allocation_bytes(4096);
  request.set_length(4096);
  request.set_access(v1::REGION_ACCESS_READ_ONLY);
  v1::RegisterRegionResponse response;
  const grpc::Status status =
      session_.stub().RegisterRegion(NewContext().get(), request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("seal"));
}

TEST_F(SessionMemory, UnknownAccessIsRefused) {
  v1::RegisterRegionRequest request;
  request.set_session_id(session_.id());
  request.set_name("kv");
  request.set_kind("memfd");
  v1::RegisterRegionResponse response;
  const grpc::Status status =
      session_.stub().RegisterRegion(NewContext().get(), request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("access=0"));
}

TEST_F(SessionMemory, HangUpEndsTheSession) {
  session_.HangUp();
  v1::CompressRequest request = WireRequest(prompt_, "tova", kBudget);
  request.mutable_spec()->set_session_id(session_.id());
  EXPECT_TRUE(Eventually([&] {
    return Compress(server_, request, nullptr).error_code() == grpc::StatusCode::NOT_FOUND;
  }));
  EXPECT_TRUE(server_.log().AwaitLine({"session_ended", "why=hang_up"}));
}

TEST_F(SessionMemory, ClosedSessionIsUnknown) {
  v1::CloseSessionRequest request;
  request.set_session_id(session_.id());
  v1::CloseSessionResponse response;
  ASSERT_TRUE(session_.stub().CloseSession(NewContext().get(), request, &response).ok());
  EXPECT_EQ(session_.stub().CloseSession(NewContext().get(), request, &response).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

}  // namespace
}  // namespace keepset::integration
