// A device that fails under a running operation.
#include <memory>
#include <utility>

#include "absl/synchronization/notification.h"
#include "gtest/gtest.h"
#include "tests/fakes/synthetic_prompt.h"
#include "tests/integration/eventually.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

TEST(DeviceFault, RunningOperationKeepsEverythingAndTheServerStopsServing) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "snapkv", 10);
  server.gate().Close();
  const auto stub = server.compression();
  const auto context = NewContext();
  v1::CompressResponse response;
  absl::Notification done;
  grpc::Status status;
  stub->async()->Compress(context.get(), &request, &response, [&](grpc::Status s) {
    status = std::move(s);
    done.Notify();
  });
  const bool has_started = server.gate().AwaitWaiting(1);
  server.gate().BreakDevice(absl::InternalError("cuda: illegal address"));
  server.gate().Open();
  done.WaitForNotification();
  ASSERT_TRUE(has_started);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.result().outcome(), v1::OUTCOME_KEPT_FULL);
  EXPECT_EQ(response.result().reason(), v1::REASON_DEVICE_FAULT);
  EXPECT_TRUE(server.log().AwaitLine({"device_fault", "illegal address"})) << server.log().text();
  EXPECT_TRUE(Eventually([&] { return server.device_faults() == 1; }));
  EXPECT_EQ(server.Health("keepset.v1.CompressionService"), 2);

  v1::CompressResponse refused;
  const auto next = NewContext();
  EXPECT_EQ(stub->Compress(next.get(), request, &refused).error_code(),
            grpc::StatusCode::UNAVAILABLE);
}

TEST(DeviceFault, EveryRunningOperationKeepsEverything) {
  constexpr int kCalls = 3;
  TestServer server("num_workers: 3");
  const fakes::SyntheticPrompt prompt({});
  const char* const policies[kCalls] = {"snapkv", "tova", "snapkv"};
  server.gate().Close();
  const auto stub = server.compression();
  struct Call {
    std::unique_ptr<grpc::ClientContext> context = NewContext();
    v1::CompressRequest request;
    v1::CompressResponse response;
    grpc::Status status;
    absl::Notification done;
  };
  Call calls[kCalls];
  for (int i = 0; i < kCalls; ++i) {
    Call& call = calls[i];
    call.request = WireRequest(prompt, policies[i], 10);
    stub->async()->Compress(call.context.get(), &call.request, &call.response,
                            [&call](grpc::Status s) {
                              call.status = std::move(s);
                              call.done.Notify();
                            });
  }
  const bool have_started = server.gate().AwaitWaiting(kCalls);
  server.gate().BreakDevice(absl::InternalError("cuda: illegal address"));
  server.gate().Open();
  for (Call& call : calls) call.done.WaitForNotification();
  ASSERT_TRUE(have_started);
  for (const Call& call : calls) {
    ASSERT_TRUE(call.status.ok()) << call.status.error_message();
    EXPECT_EQ(call.response.result().outcome(), v1::OUTCOME_KEPT_FULL);
    EXPECT_EQ(call.response.result().reason(), v1::REASON_DEVICE_FAULT);
  }
  EXPECT_TRUE(Eventually([&] { return server.device_faults() == 1; }));
}

}  // namespace
}  // namespace keepset::integration
