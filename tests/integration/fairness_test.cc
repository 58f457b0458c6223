// One worker's waiting, hanging or flooding is not paid for by the others.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/notification.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

constexpr uint64_t kBudget = 24;

TEST(Fairness, RetiresThatWaitHoldUpNobodyElse) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession patient(server);
  WorkerSession::Region held = patient.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  const v1::CompressRequest request =
      ToRegion(WireRequest(prompt, "tova", kBudget), patient.id(), held);
  WorkerStream stream(server);
  stream.Begin(1, request.spec());
  stream.Layer(1, request.layers(0));
  ASSERT_TRUE(Eventually([&] { return patient.List().regions(0).leases() == 1; }));

  // More of them than any pool has threads.
  constexpr int kWaiting = 16;
  std::atomic<int> retired = 0;
  std::vector<std::thread> waiting;
  for (int i = 0; i < kWaiting; ++i) {
    waiting.emplace_back([&] {
      const auto stub = server.sessions();
      v1::RetireRegionRequest retire;
      retire.set_session_id(patient.id());
      retire.set_region_id(held.id);
      retire.set_timeout_ms(60000);
      v1::RetireRegionResponse response;
      if (stub->RetireRegion(NewContext().get(), retire, &response).ok()) ++retired;
    });
  }
  ASSERT_TRUE(Eventually([&] { return patient.List().regions(0).retiring(); }));

  WorkerSession other(server);
  const WorkerSession::Region region = other.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  const grpc::Status status = other.Retire(region.id, 1000);
  EXPECT_TRUE(status.ok()) << status.error_message();
  v1::CloseSessionRequest close;
  close.set_session_id(other.id());
  v1::CloseSessionResponse closed;
  EXPECT_TRUE(other.stub().CloseSession(NewContext().get(), close, &closed).ok());
  EXPECT_EQ(retired.load(), 0);

  stream.Cancel(1);
  for (std::thread& thread : waiting) thread.join();
  EXPECT_GE(retired.load(), 1);  // the others find it gone
}

TEST(Fairness, RetireOfAClientThatIsGoneStopsWaiting) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession session(server);
  WorkerSession::Region held = session.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  const v1::CompressRequest request =
      ToRegion(WireRequest(prompt, "tova", kBudget), session.id(), held);
  WorkerStream stream(server);
  stream.Begin(1, request.spec());
  stream.Layer(1, request.layers(0));
  ASSERT_TRUE(Eventually([&] { return session.List().regions(0).leases() == 1; }));
  const auto context = NewContext();
  std::thread caller([&] {
    v1::RetireRegionRequest retire;
    retire.set_session_id(session.id());
    retire.set_region_id(held.id);
    retire.set_timeout_ms(60000);
    v1::RetireRegionResponse response;
    server.sessions()->RetireRegion(context.get(), retire, &response);
  });
  ASSERT_TRUE(Eventually([&] { return session.List().regions(0).retiring(); }));
  context->TryCancel();
  caller.join();
  EXPECT_TRUE(server.log().AwaitLine({"method=RetireRegion", "code=CANCELLED"}));
}

// A prompt of `seq_len` tokens in flight.
struct UnaryCall {
  UnaryCall(TestServer& server, const WorkerSession& session, int64_t seq_len,
            const std::string& request_id)
      : stub(server.compression()), context(NewContext()) {
    const fakes::SyntheticPrompt prompt({.num_layers = 4, .seq_len = seq_len});
    request = WireRequest(prompt, "tova", kBudget);
    request.mutable_spec()->set_session_id(session.id());
    request.mutable_spec()->set_request_id(request_id);
    stub->async()->Compress(context.get(), &request, &response, [this](grpc::Status status) {
      EXPECT_TRUE(status.ok()) << status.error_message();
      done.Notify();
    });
  }
  ~UnaryCall() { done.WaitForNotification(); }

  const std::unique_ptr<v1::CompressionService::Stub> stub;
  const std::unique_ptr<grpc::ClientContext> context;
  v1::CompressRequest request;
  v1::CompressResponse response;
  absl::Notification done;
};

bool AwaitQueueDepth(TestServer& server, int64_t depth) {
  const std::string sample = absl::StrCat("\nkeepset_queue_depth ", depth, "\n");
  return Eventually([&] { return absl::StrContains(server.server().RenderMetrics(), sample); });
}

// Request ids in the order in which the server ended them.
std::vector<std::string> EndedRequests(TestServer& server) {
  std::vector<std::string> ids;
  for (const absl::string_view line : absl::StrSplit(server.log().text(), '\n')) {
    const std::vector<absl::string_view> fields = absl::StrSplit(line, ' ');
    for (absl::string_view field : fields) {
      if (absl::ConsumePrefix(&field, "request_id=")) ids.emplace_back(field);
    }
  }
  return ids;
}

TEST(Fairness, SmallPromptPassesBetweenTheLayersOfALargeOne) {
  TestServer server("num_workers: 1");
  WorkerSession session(server);
  {
    server.gate().Close();
    const UnaryCall large(server, session, 5000, "large");
    ASSERT_TRUE(server.gate().AwaitWaiting(1));
    const UnaryCall small(server, session, 96, "small");
    EXPECT_TRUE(AwaitQueueDepth(server, 1));
    server.gate().Open();
  }
  EXPECT_THAT(EndedRequests(server), ::testing::ElementsAre("small", "large"));
}

TEST(Fairness, OneTenantsFloodNeitherRefusesNorDelaysAnother) {
  TestServer server("num_workers: 1 limits { queue_capacity: 3 }");
  WorkerSession flood(server, "flood");
  WorkerSession other(server, "other");
  {
    server.gate().Close();
    const UnaryCall first(server, flood, 96, "flood-0");
    ASSERT_TRUE(server.gate().AwaitWaiting(1));
    std::vector<std::unique_ptr<UnaryCall>> calls;
    for (int64_t i = 1; i <= 3; ++i) {
      calls.push_back(std::make_unique<UnaryCall>(server, flood, 96, absl::StrCat("flood-", i)));
      EXPECT_TRUE(AwaitQueueDepth(server, i));
    }
    calls.push_back(std::make_unique<UnaryCall>(server, other, 96, "other"));
    EXPECT_TRUE(AwaitQueueDepth(server, 4));
    server.gate().Open();
  }
  EXPECT_THAT(EndedRequests(server),
              ::testing::ElementsAre("flood-0", "flood-1", "other", "flood-2", "flood-3"));
}

// A client that sends without reading must not fill the server's memory with answers: the server
// stops reading, so that the client's own writes block.
TEST(Fairness, StreamThatIsNotReadIsNotReadFromEither) {
  TestServer server;
  const auto stub = server.compression();
  grpc::ClientContext context;
  const auto stream = stub->CompressStream(&context);
  // Refused for its id, one short answer each.
  v1::StreamRequest request;
  request.mutable_begin()->set_policy(std::string(4 << 10, 'p'));
  std::atomic<uint64_t> sent = 0;
  std::thread writer([&] {
    while (stream->Write(request)) ++sent;
  });
  // Far more than the server holds for one stream.
  constexpr uint64_t kFlood = 200000;
  uint64_t last = 0;
  int64_t unchanged = 0;
  const fakes::SyntheticPrompt prompt({.num_layers = 1});
  const v1::CompressRequest small = WireRequest(prompt, "tova", kBudget);
  EXPECT_TRUE(Eventually([&] {
    const uint64_t now = sent.load();
    EXPECT_TRUE(Compress(server, small, nullptr).ok());
    unchanged = now == last ? unchanged + 1 : 0;
    last = now;
    return unchanged > 100 || now > kFlood;
  }));
  EXPECT_LT(sent.load(), kFlood);
  context.TryCancel();
  writer.join();
  stream->Finish();
}

}  // namespace
}  // namespace keepset::integration
