// A worker is killed in every phase of its life: its session and its memory go, the server stays.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>

#include "tests/integration/child_process.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

constexpr uint64_t kBudget = 24;

// Whether this process, which is the server, maps the memory of that name or holds a descriptor.
bool HoldsMemory(const std::string& name) {
  std::ifstream maps("/proc/self/smaps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find("/memfd:" + name) != std::string::npos) return true;
  }
  std::error_code ignored;
  for (const auto& fd : std::filesystem::directory_iterator("/proc/self/fd", ignored)) {
    const std::string target = std::filesystem::read_symlink(fd.path(), ignored).string();
    if (target.find("/memfd:" + name) != std::string::npos) return true;
  }
  return false;
}

class ClientCrash : public ::testing::Test {
 protected:
  // A worker that stands in `phase`.
  ChildProcess& Start(const std::string& phase) {
    memory_ = phase.rfind("owned", 0) == 0 ? "keepset-owned" : "crash-" + phase;
    child_ = std::make_unique<ChildProcess>(
        std::vector<std::string>{KEEPSET_CRASH_CLIENT, server_.address(), phase},
        ChildProcess::Output::kStdout);
    EXPECT_EQ(child_->AwaitLine(""), "ready");
    return *child_;
  }

  void ExpectNothingLeft() {
    EXPECT_TRUE(Eventually([this] { return !HoldsMemory(memory_); }));
    EXPECT_TRUE(Eventually([this] { return server_.server().operations_running() == 0; }));
    const std::string page = server_.server().RenderMetrics();
    EXPECT_TRUE(Eventually([this] {
      const std::string page = server_.server().RenderMetrics();
      return page.find("keepset_sessions 0\n") != std::string::npos;
    })) << page;
    const fakes::SyntheticPrompt prompt({});
    const grpc::Status status = Compress(server_, WireRequest(prompt, "snapkv", kBudget), nullptr);
    EXPECT_TRUE(status.ok()) << status.error_message();
  }

  // Whether the metrics page comes to hold `sample`.
  bool AwaitMetric(const std::string& sample) {
    return Eventually(
        [&] { return server_.server().RenderMetrics().find(sample + "\n") != std::string::npos; });
  }

  TestServer server_;
  std::string memory_;
  std::unique_ptr<ChildProcess> child_;
};

TEST_F(ClientCrash, AfterOpenSessionTheLeaseEndsIt) {
  Start("session").Kill();
  EXPECT_TRUE(server_.log().AwaitLine({"session_ended", "why=lease_expired"}));
  ExpectNothingLeft();
}

TEST_F(ClientCrash, AfterHelloTheHangUpEndsIt) {
  Start("hello").Kill();
  EXPECT_TRUE(server_.log().AwaitLine({"session_ended", "why=hang_up"}));
  ExpectNothingLeft();
}

TEST_F(ClientCrash, AfterTheDescriptorWasPassedNobodyHoldsIt) {
  ChildProcess& child = Start("deposit");
  EXPECT_TRUE(HoldsMemory(memory_));
  child.Kill();
  ExpectNothingLeft();
}

TEST_F(ClientCrash, AfterRegistrationTheMappingGoes) {
  ChildProcess& child = Start("region");
  EXPECT_TRUE(HoldsMemory(memory_));
  child.Kill();
  EXPECT_TRUE(server_.log().AwaitLine({"session_ended", "why=hang_up", "regions=1"}));
  ExpectNothingLeft();
}

TEST_F(ClientCrash, InTheMiddleOfAStreamTheOperationIsDropped) {
  ChildProcess& child = Start("layer");
  EXPECT_EQ(server_.server().operations_running(), 1);
  child.Kill();
  EXPECT_TRUE(server_.log().AwaitLine({"method=CompressStream", "outcome=cancelled"}));
  ExpectNothingLeft();
}

TEST_F(ClientCrash, WhileTheOperationRunsItsMemoryStaysMappedUntilItEnds) {
  server_.gate().Close();
  ChildProcess& child = Start("running");
  ASSERT_TRUE(server_.gate().AwaitWaiting(1));
  child.Kill();
  EXPECT_TRUE(server_.log().AwaitLine({"session_ended", "why=hang_up"}));
  EXPECT_TRUE(HoldsMemory(memory_));
  server_.gate().Open();
  ExpectNothingLeft();
}

TEST_F(ClientCrash, MemoryOfTheServersOwnThatItMappedGoes) {
  ChildProcess& child = Start("owned");
  EXPECT_TRUE(HoldsMemory(memory_));
  child.Kill();
  EXPECT_TRUE(server_.log().AwaitLine({"session_ended", "why=hang_up", "regions=1"}));
  ExpectNothingLeft();
  EXPECT_TRUE(AwaitMetric("keepset_owned_region_bytes{kind=\"memfd\"} 0"));
}

TEST_F(ClientCrash, MemoryOfTheServersOwnIsQuarantinedWhileItsOperationRuns) {
  server_.gate().Close();
  ChildProcess& child = Start("owned_running");
  ASSERT_TRUE(server_.gate().AwaitWaiting(1));
  child.Kill();
  EXPECT_TRUE(server_.log().AwaitLine({"region_quarantined", "until=operations_end"}));
  EXPECT_TRUE(AwaitMetric("keepset_quarantined_bytes{kind=\"memfd\"} 1048576"));
  EXPECT_TRUE(AwaitMetric("keepset_quarantined_regions{kind=\"memfd\"} 1"));
  EXPECT_TRUE(HoldsMemory(memory_));
  server_.gate().Open();
  ExpectNothingLeft();
  EXPECT_TRUE(AwaitMetric("keepset_quarantined_bytes{kind=\"memfd\"} 0"));
  EXPECT_TRUE(AwaitMetric("keepset_owned_region_bytes{kind=\"memfd\"} 0"));
}

TEST_F(ClientCrash, BeforeTheResultIsReadNothingIsLeft) {
  ChildProcess& child = Start("answered");
  EXPECT_TRUE(server_.log().AwaitLine({"method=CompressStream", "outcome=compressed"}));
  EXPECT_TRUE(HoldsMemory(memory_));
  child.Kill();
  EXPECT_TRUE(server_.log().AwaitLine({"session_ended", "why=hang_up"}));
  ExpectNothingLeft();
}

}  // namespace
}  // namespace keepset::integration
