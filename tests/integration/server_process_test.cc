// keepsetd as a process: killed and started again, asked to drain.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/integration/child_process.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/typed_worker.h"

namespace keepset::integration {
namespace {

constexpr int64_t kBudget = 24;
constexpr int kServing = 1;
constexpr int kNotServing = 2;

// The supervisor's side of NOTIFY_SOCKET.
class NotifySocket {
 public:
  explicit NotifySocket(std::string path)
      : path_(std::move(path)), socket_(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    path_.copy(address.sun_path, sizeof(address.sun_path) - 1);
    const timeval wait = absl::ToTimeval(TestDeadline());
    EXPECT_EQ(::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait)), 0);
    EXPECT_EQ(::bind(socket_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  const std::string& path() const { return path_; }
  // The next message; empty when none comes before the deadline of tests.
  std::string Receive() {
    char buffer[256];
    const ssize_t size = ::recv(socket_.get(), buffer, sizeof(buffer), 0);
    return size < 0 ? "" : std::string(buffer, static_cast<size_t>(size));
  }

 private:
  const std::string path_;
  const service::UniqueFd socket_;
};

class ServerProcess : public ::testing::Test {
 protected:
  std::string address() const { return absl::StrCat("unix:", directory_.path(), "/k.sock"); }

  void Start() {
    Launch();
    ASSERT_NE(process_->AwaitLine("ready"), "");
  }

  void Launch() {
    process_ = std::make_unique<ChildProcess>(
        std::vector<std::string>{KEEPSETD_BINARY, "--listen", address(), "--metrics-listen", "off",
                                 "--threads", "1"},
        ChildProcess::Output::kStderr);
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

  int Health(const std::string& service) const { return HealthAt(address(), service); }

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

TEST_F(ServerProcess, MemoryOfAKilledServersOwnIsLostByATypedError) {
  Start();
  const auto client = Connect();
  ASSERT_NE(client, nullptr);
  client::ServiceMemory memory;
  memory.size_bytes = 1 << 20;
  const auto region = client->AllocateRegion("out", memory);
  ASSERT_TRUE(region.ok()) << region.status();
  (*region)->data()[1] = std::byte{1};

  process_->Kill();
  EXPECT_EQ(client->AllocateRegion("more", memory).status().code(), absl::StatusCode::kUnavailable);
  Start();
  ASSERT_TRUE(Eventually([&] { return client->Reopen().ok(); }));
  EXPECT_EQ((*region)->status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ((*region)->data()[1], std::byte{1}) << "what was in it can be read";
  EXPECT_EQ((*region)->Retire().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(client->AllocateRegion("out", memory).ok());
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

TEST_F(ServerProcess, SupervisorIsToldWhenItServesAndWhenItStops) {
  NotifySocket supervisor(directory_.path() + "/notify");
  ASSERT_EQ(::setenv("NOTIFY_SOCKET", supervisor.path().c_str(), 1), 0);
  Launch();
  ::unsetenv("NOTIFY_SOCKET");
  EXPECT_EQ(supervisor.Receive(), "READY=1");
  EXPECT_EQ(Health(""), kServing);
  process_->Signal(SIGTERM);
  EXPECT_EQ(supervisor.Receive(), "STOPPING=1");
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
