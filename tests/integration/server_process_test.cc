// keepsetd as a process: killed and started again, asked to drain.
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "tests/integration/child_process.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/typed_worker.h"

namespace keepset::integration {
namespace {

constexpr int64_t kBudget = 24;
constexpr int kNotServing = 2;

class ServerProcess : public ::testing::Test {
 protected:
  std::string address() const { return absl::StrCat("unix:", directory_.path(), "/k.sock"); }

  void Start() {
    process_ = std::make_unique<ChildProcess>(
        std::vector<std::string>{KEEPSETD_BINARY, "--listen", address(), "--metrics-listen", "off",
                                 "--threads", "1"},
        ChildProcess::Output::kStderr);
    ASSERT_NE(process_->AwaitLine("ready"), "");
  }

  std::unique_ptr<client::Client> Connect() {
    client::ClientOptions options;
    options.address = address();
    options.transport = client::Transport::kMemfd;
    options.client_uuid = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
    auto client = client::Client::Connect(options);
    EXPECT_TRUE(client.ok()) << client.status();
    return client.ok() ? *std::move(client) : nullptr;
  }

  // Status of grpc.health.v1; negative: the gRPC code.
  int Health(const std::string& service) {
    const std::string bytes = absl::StrCat("\x0a", std::string(1, char(service.size())), service);
    const grpc::Slice slice(bytes);
    const grpc::ByteBuffer request(&slice, 1);
    grpc::ByteBuffer response;
    grpc::GenericStub stub(grpc::CreateChannel(address(), grpc::InsecureChannelCredentials()));
    const auto context = NewContext();
    absl::Notification done;
    grpc::Status status;
    stub.UnaryCall(context.get(), "/grpc.health.v1.Health/Check", grpc::StubOptions(), &request,
                   &response, [&](grpc::Status s) {
                     status = std::move(s);
                     done.Notify();
                   });
    done.WaitForNotification();
    if (!status.ok()) return -static_cast<int>(status.error_code());
    grpc::Slice out;
    return response.DumpToSingleSlice(&out).ok() && out.size() == 2 ? out.begin()[1] : 0;
  }

  const TempDir directory_;
  const fakes::SyntheticPrompt prompt_{fakes::PromptShape{}};
  std::unique_ptr<ChildProcess> process_;
};

TEST_F(ServerProcess, ClientOfAKilledServerOpensItsSessionAgain) {
  Start();
  const auto region = *client::SharedRegion::Create("again", 1 << 20);
  std::vector<client::LayerInput> layers = TypedLayers(prompt_);
  MoveInto(*region, layers);
  const auto client = Connect();
  ASSERT_NE(client, nullptr);
  ASSERT_TRUE(client->RegisterRegion(*region, "kv", client::RegionAccess::kReadOnly).ok());
  const client::OperationSpec spec = TypedSpec(prompt_, "snapkv", kBudget);
  const auto before = client->CompressUnary(spec, layers);
  ASSERT_TRUE(before.ok()) << before.status();

  process_->Kill();
  EXPECT_EQ(client->CompressUnary(spec, layers).status().code(), absl::StatusCode::kUnavailable);

  Start();
  ASSERT_TRUE(Eventually([&] { return client->Reopen().ok(); }));
  const absl::Status twice = client->Reopen();  // the same uuid replaces the session
  EXPECT_TRUE(twice.ok()) << twice;
  const auto after = client->CompressUnary(spec, layers);
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(after->transport, "memfd");
  ASSERT_EQ(after->layers.size(), before->layers.size());
  for (size_t l = 0; l < before->layers.size(); ++l) {
    EXPECT_EQ(after->layers[l].sets[0].keep_indices, before->layers[l].sets[0].keep_indices);
  }
}

TEST_F(ServerProcess, SigtermAnswersWhatRunsRefusesWhatIsNewAndExitsZero) {
  Start();
  const auto region = *client::SharedRegion::Create("drain", 1 << 20);
  std::vector<client::LayerInput> layers = TypedLayers(prompt_);
  MoveInto(*region, layers);
  const auto client = Connect();
  ASSERT_NE(client, nullptr);
  ASSERT_TRUE(client->RegisterRegion(*region, "kv", client::RegionAccess::kReadOnly).ok());
  const auto stream = client->OpenStream();
  ASSERT_TRUE(stream.ok()) << stream.status();
  const client::OperationSpec spec = TypedSpec(prompt_, "snapkv", kBudget);
  const auto running = (*stream)->Begin(spec);
  ASSERT_TRUE(running.ok()) << running.status();
  ASSERT_TRUE((*stream)->SendLayer(*running, layers[0]).ok());
  ASSERT_TRUE(Eventually([&] { return !(*stream)->TakeEarlyResults(*running).empty(); }));

  process_->Signal(SIGTERM);
  ASSERT_TRUE(Eventually([&] { return Health("keepset.v1.CompressionService") == kNotServing; }));
  ASSERT_NE(process_->AwaitLine("draining"), "");
  EXPECT_EQ(client->CompressUnary(spec, layers).status().code(), absl::StatusCode::kUnavailable);
  const auto late = (*stream)->Begin(spec);
  ASSERT_TRUE(late.ok()) << late.status();
  EXPECT_EQ((*stream)->Finish(*late).status().code(), absl::StatusCode::kUnavailable);

  for (size_t l = 1; l < layers.size(); ++l) {
    ASSERT_TRUE((*stream)->SendLayer(*running, layers[l]).ok());
  }
  const auto result = (*stream)->Finish(*running);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->outcome, client::Outcome::kCompressed);
  EXPECT_NE(process_->AwaitLine("stopped"), "");
  const int status = process_->Wait();
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST_F(ServerProcess, SecondSigtermEndsAtOnce) {
  Start();
  const auto client = Connect();
  ASSERT_NE(client, nullptr);
  const auto stream = client->OpenStream();
  ASSERT_TRUE(stream.ok()) << stream.status();
  const auto running = (*stream)->Begin(TypedSpec(prompt_, "snapkv", kBudget));
  ASSERT_TRUE(running.ok()) << running.status();
  // Refused for its unknown policy, after the first one was begun.
  const auto refused = (*stream)->Begin(TypedSpec(prompt_, "no_such_policy", kBudget));
  ASSERT_TRUE(refused.ok()) << refused.status();
  ASSERT_FALSE((*stream)->Finish(*refused).ok());
  process_->Signal(SIGTERM);
  ASSERT_NE(process_->AwaitLine("draining"), "");
  process_->Signal(SIGTERM);
  EXPECT_NE(process_->AwaitLine("ended_at_once"), "");
  const int status = process_->Wait();
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 5) << status;
}

}  // namespace
}  // namespace keepset::integration
