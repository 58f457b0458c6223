// Results in memory of the server's own: the typed client, one server in this process.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/typed_worker.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int64_t kBudget = 20;
constexpr int64_t kBytes = 1 << 20;

// Kept positions and rows of every layer and head.
std::string RowsOf(const client::OperationResult& result, int64_t row_bytes) {
  std::string rows;
  for (const client::LayerResult& layer : result.layers) {
    for (const client::KeepSet& set : layer.sets) {
      for (const int32_t position : set.keep_indices) absl::StrAppend(&rows, position, " ");
    }
    for (const client::GatheredHead& head : layer.gathered) {
      for (int64_t i = 0; i < head.num_tokens; ++i) {
        rows.append(reinterpret_cast<const char*>(head.k + i * head.k_row_bytes), row_bytes);
        rows.append(reinterpret_cast<const char*>(head.v + i * head.v_row_bytes), row_bytes);
      }
    }
  }
  return rows;
}

class OwnedRegion : public ::testing::Test {
 protected:
  explicit OwnedRegion(const std::string& config = "") : server_(config) {}

  std::unique_ptr<client::Client> Connect(client::Transport transport = client::Transport::kMemfd) {
    return ConnectTo(server_.address(), transport);
  }
  static client::ServiceMemory Memory(int64_t bytes = kBytes) {
    client::ServiceMemory memory;
    memory.size_bytes = bytes;
    return memory;
  }
  int64_t row_bytes() const { return prompt_.shape().head_dim * 4; }
  client::OperationSpec Spec(client::GatherMode gather) const {
    client::OperationSpec spec = TypedSpec(prompt_, "snapkv", kBudget);
    spec.gather = gather;
    return spec;
  }
  // Destinations one after the other in `memory`.
  void PlaceResults(std::byte* memory, std::vector<client::LayerInput>& layers) const {
    for (client::LayerInput& layer : layers) {
      client::Destination destination;
      destination.capacity_tokens = kBudget;
      for (client::KvTensor* tensor : {&destination.k, &destination.v}) {
        tensor->size_bytes = prompt_.shape().num_kv_heads * kBudget * row_bytes();
        tensor->data = memory;
        memory += tensor->size_bytes;
      }
      layer.destination = destination;
    }
  }
  // Whether the metrics page comes to hold `sample`.
  bool AwaitMetric(const std::string& sample) {
    return Eventually(
        [&] { return server_.server().RenderMetrics().find(sample + "\n") != std::string::npos; });
  }

  TestServer server_;
  const fakes::SyntheticPrompt prompt_{{.num_layers = 2}};
};

TEST_F(OwnedRegion, RowsGatheredIntoItAreThoseOfAnInlineReply) {
  const auto inline_client = Connect(client::Transport::kInline);
  const auto inline_result =
      inline_client->CompressUnary(Spec(client::GatherMode::kInline), TypedLayers(prompt_));
  ASSERT_TRUE(inline_result.ok()) << inline_result.status();
  const auto client = Connect();
  const auto inputs = *client::SharedRegion::Create("inputs", 1 << 21);
  std::vector<client::LayerInput> layers = TypedLayers(prompt_);
  MoveInto(*inputs, layers);
  ASSERT_TRUE(client->RegisterRegion(*inputs, "in", client::RegionAccess::kReadOnly).ok());
  const auto region = client->AllocateRegion("out", Memory());
  ASSERT_TRUE(region.ok()) << region.status();
  PlaceResults((*region)->data(), layers);
  const auto result = client->CompressUnary(Spec(client::GatherMode::kDestination), layers);
  ASSERT_TRUE(result.ok()) << result.status();
  const std::string rows = RowsOf(*result, row_bytes());
  EXPECT_GT(rows.size(), static_cast<size_t>(2 * kBudget * row_bytes()));
  EXPECT_EQ(rows, RowsOf(*inline_result, row_bytes()));
}

TEST_F(OwnedRegion, KeysAndValuesMayComeFromIt) {
  const auto client = Connect();
  const auto region = client->AllocateRegion("kv", Memory());
  ASSERT_TRUE(region.ok()) << region.status();
  std::vector<client::LayerInput> layers = TypedLayers(prompt_);
  std::byte* next = (*region)->data();
  for (client::LayerInput& layer : layers) {
    for (client::KvTensor* const tensor : {&layer.k, &layer.v}) {
      const auto* const bytes = static_cast<const std::byte*>(tensor->data);
      std::copy(bytes, bytes + tensor->size_bytes, next);
      tensor->data = next;
      next += tensor->size_bytes;
    }
  }
  const auto result = client->CompressUnary(Spec(client::GatherMode::kInline), layers);
  ASSERT_TRUE(result.ok()) << result.status();
  const auto inline_result =
      Connect(client::Transport::kInline)
          ->CompressUnary(Spec(client::GatherMode::kInline), TypedLayers(prompt_));
  ASSERT_TRUE(inline_result.ok()) << inline_result.status();
  EXPECT_EQ(RowsOf(*result, row_bytes()), RowsOf(*inline_result, row_bytes()));
}

TEST_F(OwnedRegion, RetireUnmapsItAndGivesItBack) {
  const auto client = Connect();
  auto region = client->AllocateRegion("out", Memory());
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_TRUE(AwaitMetric(absl::StrCat("keepset_owned_region_bytes{kind=\"memfd\"} ", kBytes)));
  EXPECT_TRUE((*region)->Retire().ok());
  EXPECT_EQ((*region)->data(), nullptr);
  EXPECT_EQ((*region)->status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE((*region)->Retire().ok()) << "a second time";
  EXPECT_TRUE(AwaitMetric("keepset_owned_region_bytes{kind=\"memfd\"} 0"));
  EXPECT_TRUE(client->AllocateRegion("out", Memory()).ok()) << "the name is free";
}

TEST_F(OwnedRegion, TheEndOfTheObjectRetiresIt) {
  const auto client = Connect();
  ASSERT_TRUE(client->AllocateRegion("out", Memory()).ok());
  EXPECT_TRUE(client->AllocateRegion("out", Memory()).ok());
}

// What a worker is told between two messages of the typed client.
class OwnedRegionByHand : public OwnedRegion {
 protected:
  static v1::AllocateRegionRequest Request(const WorkerSession& session, uint64_t length) {
    v1::AllocateRegionRequest request;
    request.set_session_id(session.id());
    request.set_name("out");
    request.set_kind("memfd");
    request.set_length(length);
    return request;
  }
  // An operation whose results go to the region.
  v1::CompressRequest OperationInto(const std::string& region_id, const WorkerSession& session) {
    v1::CompressRequest request = WireRequest(prompt_, "snapkv", kBudget);
    request.mutable_spec()->set_session_id(session.id());
    request.mutable_spec()->set_gather(v1::GATHER_DESTINATION);
    const uint64_t bytes = prompt_.shape().num_kv_heads * kBudget * row_bytes();
    uint64_t offset = 0;
    for (v1::LayerInput& layer : *request.mutable_layers()) {
      auto* const destination = layer.mutable_destination();
      destination->set_capacity_tokens(kBudget);
      for (v1::KvTensor* const tensor : {destination->mutable_k(), destination->mutable_v()}) {
        tensor->set_dtype(v1::DTYPE_F32);
        v1::RegionSlice* const slice = tensor->mutable_data()->mutable_region();
        slice->set_region_id(region_id);
        slice->set_offset(offset);
        slice->set_length(bytes);
        offset += bytes;
      }
    }
    return request;
  }
  // Allocates a region of `length` bytes, gives up while the server has it made and not answered.
  void AllocateAndGiveUp(WorkerSession& session, uint64_t length) {
    const v1::AllocateRegionRequest request = Request(session, length);
    v1::AllocateRegionResponse response;
    GiveUpAt(session, absl::StrCat("region_allocated kind=memfd bytes=", length),
             [&](grpc::ClientContext* context, std::function<void(grpc::Status)> over) {
               session.stub().async()->AllocateRegion(context, &request, &response,
                                                      std::move(over));
             });
  }
  // The same of a region of the worker's own.
  void RegisterAndGiveUp(WorkerSession& session, uint64_t length) {
    const service::UniqueFd fd(::memfd_create("own", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    ASSERT_EQ(::ftruncate(fd.get(), static_cast<off_t>(length)), 0);
    ASSERT_EQ(::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
    v1::RegisterRegionRequest request;
    request.set_session_id(session.id());
    request.set_name("own");
    request.set_kind("memfd");
    request.set_fd_token(session.PassFd(fd.get()));
    request.set_allocation_bytes(length);
    request.set_length(length);
    request.set_access(v1::REGION_ACCESS_READ_ONLY);
    v1::RegisterRegionResponse response;
    GiveUpAt(session, absl::StrCat("region_registered kind=memfd bytes=", length),
             [&](grpc::ClientContext* context, std::function<void(grpc::Status)> over) {
               session.stub().async()->RegisterRegion(context, &request, &response,
                                                      std::move(over));
             });
  }

 private:
  // Cancels the call that `start` begins while the server writes `line`.
  void GiveUpAt(
      WorkerSession& session, const std::string& line,
      const std::function<void(grpc::ClientContext*, std::function<void(grpc::Status)>)>& start) {
    const auto context = NewContext();
    absl::Notification over;
    server_.log().Hold(line);
    start(context.get(), [&over](const grpc::Status&) { over.Notify(); });
    EXPECT_TRUE(server_.log().AwaitLine({line}));
    context->TryCancel();
    over.WaitForNotification();
    // By an answer that writes no log, time for the server to hear of it.
    server_.Health("");
    server_.log().Release();
    // Behind it on the same thread of the server.
    v1::RegisterRegionResponse ignored;
    EXPECT_FALSE(session.stub().RegisterRegion(NewContext().get(), {}, &ignored).ok());
  }
};

TEST_F(OwnedRegionByHand, ARetireWaitsForTheOperationThatWritesIt) {
  WorkerSession session(server_);
  v1::AllocateRegionResponse region;
  ASSERT_TRUE(
      session.stub().AllocateRegion(NewContext().get(), Request(session, kBytes), &region).ok());
  const v1::CompressRequest request = OperationInto(region.region_id(), session);
  server_.gate().Close();
  grpc::Status answered;
  std::thread caller([&] { answered = Compress(server_, request, nullptr); });
  EXPECT_TRUE(server_.gate().AwaitWaiting(1));
  grpc::Status retired;
  std::atomic<bool> has_returned = false;
  std::thread retirer([&] {
    retired = session.Retire(region.region_id(), 30000);
    has_returned = true;
  });
  EXPECT_TRUE(Eventually([&] {
    const v1::ListRegionsResponse regions = session.List();
    return regions.regions_size() == 1 && regions.regions(0).retiring() &&
           regions.regions(0).leases() == 1;
  }));
  EXPECT_EQ(session.Retire(region.region_id(), 1).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_FALSE(has_returned);
  server_.gate().Open();
  caller.join();
  retirer.join();
  EXPECT_TRUE(answered.ok()) << answered.error_message();
  EXPECT_TRUE(retired.ok()) << retired.error_message();
  EXPECT_EQ(session.List().regions_size(), 0);
}

// Nobody has heard of it, so nobody would retire it. The server hears of a cancel some time after
// the client has given up: then it has answered, and the next call is the one.
TEST_F(OwnedRegionByHand, AnAllocationWhoseCallerIsGoneIsGivenBack) {
  WorkerSession session(server_);
  uint64_t length = 0;
  EXPECT_TRUE(Eventually([&] {
    length += 4096;
    AllocateAndGiveUp(session, length);
    const v1::ListRegionsResponse left = session.List();
    for (const v1::Region& region : left.regions()) session.Retire(region.region_id(), 30000);
    return left.regions_size() == 0;
  }));
}

TEST_F(OwnedRegionByHand, ARegistrationWhoseCallerIsGoneIsGivenBack) {
  WorkerSession session(server_);
  uint64_t length = 0;
  EXPECT_TRUE(Eventually([&] {
    length += 4096;
    RegisterAndGiveUp(session, length);
    const v1::ListRegionsResponse left = session.List();
    for (const v1::Region& region : left.regions()) session.Retire(region.region_id(), 30000);
    return left.regions_size() == 0;
  }));
}

TEST_F(OwnedRegion, AReopenedSessionHasLostItAndItsMemoryCanStillBeReadAndRetired) {
  const auto client = Connect();
  const auto region = client->AllocateRegion("out", Memory());
  ASSERT_TRUE(region.ok()) << region.status();
  (*region)->data()[5] = std::byte{5};
  ASSERT_TRUE(client->Reopen().ok());
  const absl::Status lost = (*region)->status();
  EXPECT_EQ(lost.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(lost.message()), HasSubstr("allocate another"));
  EXPECT_EQ((*region)->data()[5], std::byte{5});
  std::vector<client::LayerInput> layers = TypedLayers(prompt_);
  PlaceResults((*region)->data(), layers);
  EXPECT_EQ(client->CompressUnary(Spec(client::GatherMode::kDestination), layers).status().code(),
            absl::StatusCode::kFailedPrecondition);
  static_cast<void>((*region)->Retire());
  EXPECT_EQ((*region)->data(), nullptr);
  EXPECT_TRUE(client->AllocateRegion("out", Memory()).ok());
}

TEST_F(OwnedRegion, RegionsMayEndWhileTheSessionIsOpenedAgain) {
  const auto client = Connect();
  std::vector<std::unique_ptr<client::ServiceRegion>> held;
  std::thread allocator([&] {
    for (int i = 0; i < 40; ++i) {
      auto region = client->AllocateRegion(absl::StrCat("out", i), Memory(4096));
      if (region.ok() && i % 8 == 0) held.push_back(*std::move(region));
    }
  });
  for (int i = 0; i < 10; ++i) EXPECT_TRUE(client->Reopen().ok());
  allocator.join();
  EXPECT_TRUE(client->Reopen().ok());
  for (const auto& region : held) EXPECT_FALSE(region->status().ok()) << region->name();
}

TEST_F(OwnedRegion, AWorkerOfAServerThatDrainsIsToldAndMayRetire) {
  const auto client = Connect();
  const auto region = client->AllocateRegion("out", Memory());
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_FALSE(client->draining());
  server_.server().StartDraining();
  EXPECT_TRUE(Eventually([&] { return client->draining(); }));
  EXPECT_TRUE((*region)->Retire().ok());
}

TEST_F(OwnedRegion, ARegionOfTheServersIsNotRetiredByName) {
  const auto client = Connect();
  const auto region = client->AllocateRegion("out", Memory());
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ(client->RetireRegion("out").code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(OwnedRegion, AnInlineClientHasNone) {
  EXPECT_EQ(Connect(client::Transport::kInline)->AllocateRegion("out", Memory()).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(OwnedRegion, AServerInHostMemorySaysThatItHasNoDevice) {
  client::ServiceMemory memory = Memory();
  memory.kind = "cuda_ipc";
  memory.device_uuid = "GPU-0";
  const absl::Status status = Connect()->AllocateRegion("out", memory).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("this server has no device"));
}

TEST_F(OwnedRegion, ADefaultServerListsTheExtension) {
  const auto info = Connect()->GetServerInfo();
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_THAT(info->extensions, Contains("owned_regions"));
}

class NoOwnedRegions : public OwnedRegion {
 protected:
  NoOwnedRegions() : OwnedRegion("memory { max_owned_bytes: 0 }") {}
};

TEST_F(NoOwnedRegions, TheServerNamesTheKeyAndDoesNotListTheExtension) {
  const auto client = Connect();
  const absl::Status status = client->AllocateRegion("out", Memory()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("memory.max_owned_bytes"));
  EXPECT_THAT(client->GetServerInfo()->extensions, Not(Contains("owned_regions")));
}

class FewOwnedBytes : public OwnedRegion {
 protected:
  FewOwnedBytes() : OwnedRegion("memory { max_owned_bytes: 16777216 }") {}
};

TEST_F(FewOwnedBytes, ASessionHasAQuarterOfTheServersLimit) {
  const auto client = Connect();
  const auto region = client->AllocateRegion("out", Memory(4 << 20));
  ASSERT_TRUE(region.ok()) << region.status();
  const absl::Status status = client->AllocateRegion("more", Memory(1)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("memory.max_owned_bytes_per_session"));
}

}  // namespace
}  // namespace keepset::integration
