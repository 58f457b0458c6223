#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>

#include "absl/synchronization/notification.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

constexpr uint64_t kBudget = 24;
constexpr int kServing = 1;
constexpr int kNotServing = 2;

TEST(Drain, RefusesNewOperationsAndFinishesOpenOnes) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  WorkerStream stream(server);
  stream.Begin(1, request.spec());
  ASSERT_TRUE(Eventually([&] { return server.server().operations_running() == 1; }));
  server.server().StartDraining();
  EXPECT_EQ(Compress(server, request, nullptr).error_code(), grpc::StatusCode::UNAVAILABLE);
  stream.Begin(2, request.spec());
  const std::optional<v1::StreamResponse> refused = stream.NextAnswer();
  ASSERT_TRUE(refused.has_value() && refused->has_error());
  EXPECT_EQ(refused->error().code(), static_cast<int>(absl::StatusCode::kUnavailable));
  EXPECT_FALSE(server.server().WaitIdle(absl::ZeroDuration()));
  for (const v1::LayerInput& layer : request.layers()) stream.Layer(1, layer);
  stream.End(1);
  const std::optional<v1::StreamResponse> response = stream.NextAnswer();
  ASSERT_TRUE(response.has_value());
  EXPECT_TRUE(response->has_result());
  EXPECT_TRUE(server.server().WaitIdle(TestDeadline()));
}

TEST(Drain, HealthSaysNotServing) {
  TestServer server;
  EXPECT_EQ(server.Health(""), kServing);
  EXPECT_EQ(server.Health("keepset.v1.CompressionService"), kServing);
  server.server().StartDraining();
  EXPECT_EQ(server.Health(""), kServing);
  EXPECT_EQ(server.Health("keepset.v1.CompressionService"), kNotServing);
}

TEST(Drain, StoppingAServerEndsIdleStreams) {
  TestServer server;
  WorkerStream stream(server);
  const fakes::SyntheticPrompt prompt({});
  stream.Begin(1, WireSpec(prompt, "no_such_policy", kBudget));
  ASSERT_TRUE(stream.NextAnswer()->has_error());  // the stream is up
  server.Stop();
  EXPECT_FALSE(stream.NextAnswer().has_value());
  EXPECT_EQ(stream.Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST(Drain, StoppingAServerCutsOperationsThatWait) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerStream stream(server);
  stream.Begin(1, WireSpec(prompt, "tova", kBudget));
  ASSERT_TRUE(Eventually([&] { return server.server().operations_running() == 1; }));
  server.Stop();
  EXPECT_FALSE(stream.NextAnswer().has_value());
  EXPECT_FALSE(stream.Finish().ok());
}

TEST(Drain, RpcNeedsTheAdminSwitch) {
  TestServer server;
  v1::DrainResponse response;
  const grpc::Status status = server.info()->Drain(NewContext().get(), {}, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::PERMISSION_DENIED);
}

TEST(Drain, RpcDrainsAndCountsWhatIsLeft) {
  TestServer server("enable_admin: true");
  const fakes::SyntheticPrompt prompt({});
  WorkerStream stream(server);
  stream.Begin(1, WireSpec(prompt, "tova", kBudget));
  ASSERT_TRUE(Eventually([&] { return server.server().operations_running() == 1; }));
  v1::DrainResponse response;
  ASSERT_TRUE(server.info()->Drain(NewContext().get(), {}, &response).ok());
  EXPECT_EQ(response.operations_left(), 1);
  v1::GetServerInfoResponse info;
  ASSERT_TRUE(server.info()->GetServerInfo(NewContext().get(), {}, &info).ok());
  EXPECT_TRUE(info.draining());
}

TEST(Drain, ManyThatWaitHoldUpNobodyElse) {
  TestServer server("enable_admin: true");
  const fakes::SyntheticPrompt prompt({});
  WorkerSession session(server);
  WorkerStream stream(server);
  stream.Begin(1, WireSpec(prompt, "tova", kBudget));
  ASSERT_TRUE(Eventually([&] { return server.server().operations_running() == 1; }));
  const auto stub = server.info();
  v1::DrainRequest request;
  request.set_timeout_ms(600000);
  constexpr int kDrains = 8;
  struct Call {
    std::unique_ptr<grpc::ClientContext> context = NewContext();
    v1::DrainResponse response;
    absl::Notification over;
  } calls[kDrains];
  for (Call& call : calls) {
    stub->async()->Drain(call.context.get(), &request, &call.response,
                         [&call](const grpc::Status&) { call.over.Notify(); });
  }
  ASSERT_TRUE(Eventually([&] {
    v1::GetServerInfoResponse info;
    return server.info()->GetServerInfo(NewContext().get(), {}, &info).ok() && info.draining();
  }));
  // Gives up well before the stream does, whose end would let the drains go.
  const auto retire = [&session] {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() +
                         absl::ToChronoMilliseconds(TestDeadline() / 3));
    v1::RetireRegionRequest unknown;
    unknown.set_session_id(session.id());
    unknown.set_region_id("no such region");
    v1::RetireRegionResponse ignored;
    return session.stub().RetireRegion(&context, unknown, &ignored).error_code();
  };
  EXPECT_EQ(retire(), grpc::StatusCode::NOT_FOUND);
  for (int i = 0; i < kDrains / 2; ++i) calls[i].context->TryCancel();
  for (int i = 0; i < kDrains / 2; ++i) calls[i].over.WaitForNotification();
  EXPECT_EQ(retire(), grpc::StatusCode::NOT_FOUND);
  stream.Cancel(1);
  for (Call& call : calls) call.over.WaitForNotification();
}

TEST(Drain, OpenLeaseStreamsAreTold) {
  TestServer server;
  WorkerSession session(server);
  const auto context = NewContext();
  const auto stream = session.stub().Lease(context.get());
  v1::LeaseBeat beat;
  beat.set_session_id(session.id());
  ASSERT_TRUE(stream->Write(beat));
  v1::LeaseNotice notice;
  ASSERT_TRUE(stream->Read(&notice));
  EXPECT_EQ(notice.lease_seconds(), 120);
  EXPECT_FALSE(notice.draining());
  server.server().StartDraining();
  ASSERT_TRUE(stream->Read(&notice));
  EXPECT_TRUE(notice.draining());
  context->TryCancel();
  stream->Finish();
}

}  // namespace
}  // namespace keepset::integration
