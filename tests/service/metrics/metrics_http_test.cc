#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/metrics/metrics.h"
#include "tests/service/metrics/exposition_page.h"

namespace keepset::service {
namespace {

std::unique_ptr<Metrics> NewTestMetrics() {
  return Metrics::New({"0.1.0", "cpu/scalar"}, {{"full"}, {"memfd"}, {"ppl"}, {"directory"}});
}

// The body of one GET /metrics, or "" with a test failure.
std::string Scrape(const std::string& address) {
  const size_t colon = address.rfind(':');
  uint32_t port = 0;
  if (colon == std::string::npos || !absl::SimpleAtoi(address.substr(colon + 1), &port)) {
    ADD_FAILURE() << "not host:port: " << address;
    return "";
  }
  sockaddr_in peer = {};
  peer.sin_family = AF_INET;
  peer.sin_port = htons(static_cast<uint16_t>(port));
  inet_pton(AF_INET, address.substr(0, colon).c_str(), &peer.sin_addr);
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  std::string reply;
  if (connect(fd, reinterpret_cast<sockaddr*>(&peer), sizeof(peer)) == 0) {
    const std::string request = "GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n";
    EXPECT_EQ(send(fd, request.data(), request.size(), MSG_NOSIGNAL), request.size());
    char buffer[4096];
    for (ssize_t n; (n = recv(fd, buffer, sizeof(buffer), 0)) > 0;) reply.append(buffer, n);
  }
  close(fd);
  const size_t body = reply.find("\r\n\r\n");
  if (!absl::StartsWith(reply, "HTTP/1.1 200") || body == std::string::npos) {
    ADD_FAILURE() << "scrape of " << address << " answered: " << reply.substr(0, 80);
    return "";
  }
  return reply.substr(body + 4);
}

TEST(MetricsServe, BindsAFreePortAndAnswersAScrape) {
  const auto metrics = NewTestMetrics();
  metrics->SetQueueDepth(5);
  const absl::StatusOr<std::string> address = metrics->Serve("127.0.0.1:0");
  ASSERT_TRUE(address.ok()) << address.status();
  EXPECT_THAT(*address, testing::Not(testing::EndsWith(":0")));
  const ExpositionPage page = ParsePage(Scrape(*address));
  EXPECT_EQ(ValueOf(page, "keepset_queue_depth"), 5);
  for (const auto& [name, value] : ParsePage(metrics->Render()).series) {
    EXPECT_TRUE(page.series.contains(name)) << name;
  }
}

TEST(MetricsServe, AnswersParallelScrapes) {
  const auto metrics = NewTestMetrics();
  const absl::StatusOr<std::string> address = metrics->Serve("127.0.0.1:0");
  ASSERT_TRUE(address.ok()) << address.status();
  std::vector<std::thread> scrapers;
  for (int i = 0; i < 4; ++i) {
    scrapers.emplace_back(
        [&address] { EXPECT_THAT(Scrape(*address), testing::HasSubstr("keepset_build_info")); });
  }
  for (std::thread& thread : scrapers) thread.join();
}

TEST(MetricsServe, RefusesATakenPort) {
  const auto first = NewTestMetrics();
  const absl::StatusOr<std::string> address = first->Serve("127.0.0.1:0");
  ASSERT_TRUE(address.ok()) << address.status();
  const auto second = NewTestMetrics();
  const absl::Status refused = second->Serve(*address).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kAlreadyExists) << refused;
  EXPECT_THAT(std::string(refused.message()), testing::HasSubstr(*address));
}

TEST(MetricsServe, CanServeAfterATakenPort) {
  const auto first = NewTestMetrics();
  const absl::StatusOr<std::string> address = first->Serve("127.0.0.1:0");
  ASSERT_TRUE(address.ok()) << address.status();
  const auto second = NewTestMetrics();
  EXPECT_FALSE(second->Serve(*address).ok());
  EXPECT_TRUE(second->Serve("127.0.0.1:0").ok());
}

TEST(MetricsServe, RefusesToServeTwice) {
  const auto metrics = NewTestMetrics();
  ASSERT_TRUE(metrics->Serve("127.0.0.1:0").ok());
  EXPECT_EQ(metrics->Serve("127.0.0.1:0").status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(MetricsServe, RefusesWhatIsNoAddress) {
  for (const char* address :
       {"", "9464", ":9464", "127.0.0.1", "127.0.0.1:", "127.0.0.1:70000", "127.0.0.1:-1",
        "127.0.0.1:9464s", "127.0.0.1:1,127.0.0.1:2", "::1:9464", "no such host:1"}) {
    const auto metrics = NewTestMetrics();
    EXPECT_EQ(metrics->Serve(address).status().code(), absl::StatusCode::kInvalidArgument)
        << address;
  }
}

TEST(MetricsServe, FreesThePortAtDestruction) {
  auto metrics = NewTestMetrics();
  const absl::StatusOr<std::string> address = metrics->Serve("127.0.0.1:0");
  ASSERT_TRUE(address.ok()) << address.status();
  metrics.reset();
  const auto next = NewTestMetrics();
  EXPECT_TRUE(next->Serve(*address).ok());
}

TEST(MetricsPage, PassesPromtool) {
  if (std::system("command -v promtool >/dev/null 2>&1") != 0) {
    GTEST_SKIP() << "promtool is not installed (Debian package prometheus)";
  }
  const auto metrics = NewTestMetrics();
  OperationSample sample;
  sample.policy = "full";
  sample.outcome = "kept_full";
  sample.reason = "none";
  sample.stages[0] = absl::Microseconds(20);
  sample.input_tokens = sample.kept_tokens = 10;
  metrics->RecordOperation(sample);
  sample.policy = "compilerkv";
  sample.entropy_bin = 3;
  metrics->RecordOperation(sample);
  ShadowSample shadow;
  shadow.kept_overlap = 0.75;
  shadow.time = absl::Milliseconds(1);
  metrics->RecordShadow(shadow);
  metrics->SetProcessUsage(ReadProcessUsage());
  metrics->EnableTableSource("directory");
  metrics->RecordSourceSync("directory", absl::Now());
  metrics->SetTables({{"llama", "name \"quoted\"\\\n", "1", "sha256:aa"}}, absl::UnixEpoch());
  const std::string path = testing::TempDir() + absl::StrCat("/keepset_page_", getpid(), ".txt");
  std::ofstream(path) << metrics->Render();
  const std::string command = absl::StrCat("promtool check metrics <", path, " 2>&1");
  FILE* pipe = popen(command.c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  std::string said;
  char buffer[512];
  while (fgets(buffer, sizeof(buffer), pipe) != nullptr) said += buffer;
  EXPECT_EQ(pclose(pipe), 0) << said;
  unlink(path.c_str());
}

}  // namespace
}  // namespace keepset::service
