// What ends keepsetd, in which order: signals, and a device that fails beside them.
#include <gtest/gtest.h>
#include <signal.h>
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
constexpr int kFailure = 5;

class ProcessEnd : public ::testing::Test {
 protected:
  std::string address() const { return absl::StrCat("unix:", directory_.path(), "/k.sock"); }

  void Start(int drain_timeout_ms) {
    process_ = std::make_unique<ChildProcess>(
        std::vector<std::string>{KEEPSET_GATED_KEEPSETD, "--listen", address(), "--metrics-listen",
                                 "off", "--drain-timeout-ms", absl::StrCat(drain_timeout_ms)},
        ChildProcess::Output::kStderr);
    ASSERT_NE(process_->AwaitLine("ready"), "");
    client_ = ConnectTo(address(), client::Transport::kInline);
    ASSERT_NE(client_, nullptr);
    auto stream = client_->OpenStream();
    ASSERT_TRUE(stream.ok()) << stream.status();
    stream_ = *std::move(stream);
  }

  // An operation that has its first layer's answer and waits for the other layers.
  void BeginOperation() {
    const auto operation = stream_->Begin(TypedSpec(prompt_, "snapkv", kBudget));
    ASSERT_TRUE(operation.ok()) << operation.status();
    operation_ = *operation;
    ASSERT_TRUE(stream_->SendLayer(operation_, layers_[0]).ok());
    ASSERT_TRUE(Eventually([&] { return !stream_->TakeEarlyResults(operation_).empty(); }));
  }

  // A process that ends at once has ended after so many answers.
  void ExpectGoesOn() {
    constexpr int kAnswers = 200;
    for (int i = 0; i < kAnswers; ++i) ASSERT_GT(HealthAt(address(), ""), 0) << i;
  }

  void ExpectAnsweredForTheFault() {
    for (size_t l = 1; l < layers_.size(); ++l) {
      ASSERT_TRUE(stream_->SendLayer(operation_, layers_[l]).ok());
    }
    const auto result = stream_->Finish(operation_);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->outcome, client::Outcome::kKeptFull);
    EXPECT_EQ(result->reason, client::Reason::kDeviceFault);
  }

  void ExpectEndsWith(int exit_code) {
    const int status = process_->Wait();
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == exit_code) << status;
  }

  static constexpr int kLongDrainMs = 600'000;
  const TempDir directory_;
  const fakes::SyntheticPrompt prompt_{fakes::PromptShape{}};
  const std::vector<client::LayerInput> layers_ = TypedLayers(prompt_);
  std::unique_ptr<ChildProcess> process_;
  std::unique_ptr<client::Client> client_;
  std::unique_ptr<client::CompressStream> stream_;
  uint64_t operation_ = 0;
};

TEST_F(ProcessEnd, FaultDuringADrainCutsNoOperation) {
  Start(kLongDrainMs);
  BeginOperation();
  process_->Signal(SIGTERM);
  ASSERT_NE(process_->AwaitLine("draining"), "");
  process_->Signal(SIGUSR1);
  ASSERT_NE(process_->AwaitLine("device_fault"), "");
  ExpectGoesOn();
  ExpectAnsweredForTheFault();
  EXPECT_NE(process_->AwaitLine("stopped"), "");
  ExpectEndsWith(kFailure);
}

TEST_F(ProcessEnd, FirstSignalAfterAFaultCutsNoOperation) {
  Start(kLongDrainMs);
  BeginOperation();
  process_->Signal(SIGUSR1);
  ASSERT_NE(process_->AwaitLine("draining"), "");
  ExpectGoesOn();
  process_->Signal(SIGTERM);
  ASSERT_NE(process_->AwaitLine("signal"), "");
  ExpectGoesOn();
  ExpectAnsweredForTheFault();
  EXPECT_NE(process_->AwaitLine("stopped"), "");
  ExpectEndsWith(kFailure);
}

TEST_F(ProcessEnd, SecondSignalAfterAFaultEndsAtOnce) {
  Start(kLongDrainMs);
  BeginOperation();
  process_->Signal(SIGUSR1);
  ASSERT_NE(process_->AwaitLine("draining"), "");
  process_->Signal(SIGTERM);
  ASSERT_NE(process_->AwaitLine("signal"), "");
  process_->Signal(SIGINT);
  EXPECT_NE(process_->AwaitLine("ended_at_once operations=1"), "");
  ExpectEndsWith(kFailure);
}

TEST_F(ProcessEnd, FaultAloneEndsTheProcessAfterItsAnswers) {
  Start(kLongDrainMs);
  BeginOperation();
  process_->Signal(SIGUSR1);
  ASSERT_NE(process_->AwaitLine("draining"), "");
  ExpectAnsweredForTheFault();
  EXPECT_NE(process_->AwaitLine("stopped"), "");
  ExpectEndsWith(kFailure);
}

// Stopping waits for what runs on the device, which may never end.
TEST_F(ProcessEnd, SecondSignalWhileTheServerStopsEndsAtOnce) {
  Start(1);
  BeginOperation();
  process_->Signal(SIGUSR2);
  ASSERT_NE(process_->AwaitLine("closed"), "");
  ASSERT_TRUE(stream_->SendLayer(operation_, layers_[1]).ok());
  process_->Signal(SIGTERM);
  ASSERT_NE(process_->AwaitLine("draining"), "");
  ASSERT_TRUE(Eventually([&] { return HealthAt(address(), "") < 0; })) << "it has stopped serving";
  process_->Signal(SIGTERM);
  EXPECT_NE(process_->AwaitLine("ended_at_once"), "");
  ExpectEndsWith(kFailure);
}

}  // namespace
}  // namespace keepset::integration
