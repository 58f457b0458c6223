// `keepset` and the C++ client against a real server: the same answers as in process.
#include "service/server.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "base/clock.h"
#include "base/log.h"
#include "clients/cpp/client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/server_config/server_config.h"
#include "tests/clients/cli_runner.h"

namespace keepset::cli {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::string Bytes(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

class ServerTest : public CliTest {
 protected:
  ServerTest() {
    std::filesystem::create_directory(Path("tables"));
    std::filesystem::copy_file(Golden("cli_table.safetensors"), Path("tables/t.safetensors"));
    v1::ServerConfig config;
    config.add_listen("unix:" + Path("k.sock"));
    config.set_metrics_listen("off");
    config.set_tables_directory(Path("tables"));
    EXPECT_TRUE(service::ResolveServerConfig(config).ok());
    auto server = service::Server::Start(config, {SystemClock(), log_, 1, nullptr});
    EXPECT_TRUE(server.ok()) << server.status();
    if (server.ok()) server_ = *std::move(server);
  }

  // The result file's bytes of one run, empty when it failed.
  std::string Result(std::vector<std::string> flags, const std::vector<std::string>& path) {
    flags.insert(flags.end(), path.begin(), path.end());
    const CliRun run = Compress(flags);
    EXPECT_EQ(run.exit_code, 0) << run.err;
    return Bytes(Path("result"));
  }

  std::vector<std::string> Server(const std::string& transport) const {
    return {"--server", "unix:" + Path("k.sock"), "--transport", transport};
  }

  std::ostringstream lines_;
  Logger log_{&lines_, LogFormat::kText, SystemClock()};
  std::unique_ptr<service::Server> server_;
};

struct SameAnswerCase {
  std::string name;
  std::vector<std::string> flags;
};

class SameAnswer : public ServerTest, public ::testing::WithParamInterface<SameAnswerCase> {};

TEST_P(SameAnswer, ResultFilesAreEqualByteForByte) {
  std::vector<std::string> flags = GetParam().flags;
  flags.push_back("--gather");
  const std::string in_process = Result(flags, {});
  EXPECT_EQ(Result(flags, Server("memfd")), in_process);
  EXPECT_EQ(Result(flags, Server("inline")), in_process);
}

INSTANTIATE_TEST_SUITE_P(
    Requests, SameAnswer,
    ::testing::Values(
        SameAnswerCase{"Snapkv", {"--policy", "snapkv", "--budget", "12"}},
        SameAnswerCase{"SnapkvSequence",
                       {"--policy", "snapkv", "--budget", "12", "--scope", "sequence"}},
        SameAnswerCase{"Tova", {"--policy", "tova", "--kept-fraction", "0.3"}},
        SameAnswerCase{"Knorm", {"--policy", "knorm", "--budget-bytes", "320"}},
        SameAnswerCase{"Random", {"--policy", "random", "--budget", "7", "--param", "seed=3"}},
        SameAnswerCase{"ProtectedSpan",
                       {"--policy", "streaming_llm", "--budget", "12", "--protect-sink", "1",
                        "--protect-span", "system"}},
        SameAnswerCase{"KeptFull", {"--policy", "full"}},
        SameAnswerCase{"KeptFullPerHead", {"--policy", "snapkv", "--budget", "64"}},
        SameAnswerCase{"Compilerkv",
                       {"--policy", "compilerkv", "--budget", "12", "--ppl", "12.7", "--table",
                        std::string(KEEPSET_SOURCE_DIR) + "/tests/golden/cli_table.safetensors"}},
        SameAnswerCase{"CompilerkvLayerAlpha",
                       {"--policy", "compilerkv", "--budget", "12", "--ppl", "12.7", "--param",
                        "alpha_scope=layer", "--table",
                        std::string(KEEPSET_SOURCE_DIR) + "/tests/golden/cli_table.safetensors"}},
        SameAnswerCase{"CompilerkvPerHead",
                       {"--policy", "compilerkv", "--budget", "12", "--scope", "kv_head", "--param",
                        "missing_ppl=median", "--table",
                        std::string(KEEPSET_SOURCE_DIR) + "/tests/golden/cli_table.safetensors"}}),
    [](const auto& info) { return info.param.name; });

TEST_F(ServerTest, ShadowTableIsReportedAndLeavesTheResultAlone) {
  const std::vector<std::string> flags = {"--policy", "compilerkv", "--budget", "12", "--ppl", "3"};
  const std::string plain = Result(flags, Server("inline"));
  std::vector<std::string> shadowed = flags;
  for (const char* flag : {"--shadow-table", "golden-cli", "--json"}) shadowed.emplace_back(flag);
  for (const std::string& flag : Server("inline")) shadowed.push_back(flag);
  const CliRun run = Compress(shadowed);
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(Bytes(Path("result")), plain);
  const nlohmann::json document = nlohmann::json::parse(run.out, nullptr, false);
  ASSERT_TRUE(document["shadow"].is_object()) << run.out;
  // The active table beside itself.
  EXPECT_EQ(document["shadow"]["table"], document["table"]);
  EXPECT_EQ(document["shadow"]["kept_overlap"], 1.0);
  EXPECT_EQ(document["shadow"]["would_be_bytes"], document["bytes_after"]);
}

TEST_F(ServerTest, ShadowTableThatIsNotThereFailsBesideTheAnswer) {
  std::vector<std::string> flags = {"--policy", "compilerkv",     "--budget", "12",    "--ppl",
                                    "3",        "--shadow-table", "nobody@2", "--json"};
  for (const std::string& flag : Server("inline")) flags.push_back(flag);
  const CliRun run = Compress(flags);
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const nlohmann::json document = nlohmann::json::parse(run.out, nullptr, false);
  EXPECT_THAT(document["shadow"]["error"].get<std::string>(), HasSubstr("nobody"));
}

TEST_F(ServerTest, InfoListsTheActiveTable) {
  const CliRun run = RunBinary({"info", "--server", "unix:" + Path("k.sock")});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.out, HasSubstr("golden-cli"));
}

TEST_F(ServerTest, StatisticsTellWhatOperationsDid) {
  ASSERT_EQ(Result({"--policy", "compilerkv", "--budget", "12", "--ppl", "3"}, Server("inline")),
            Result({"--policy", "compilerkv", "--budget", "12", "--ppl", "3"}, Server("memfd")));
  ASSERT_FALSE(Result({"--policy", "tova", "--budget", "64"}, Server("inline")).empty());
  const CliRun run =
      RunBinary({"info", "--server", "unix:" + Path("k.sock"), "--statistics", "--json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const nlohmann::json document = nlohmann::json::parse(run.out, nullptr, false);
  ASSERT_EQ(document["operations"].size(), 2u) << run.out;
  const nlohmann::json& gated = document["operations"][0];
  EXPECT_EQ(gated["policy"], "compilerkv");
  EXPECT_EQ(gated["table"]["name"], "golden-cli");
  EXPECT_EQ(gated["outcomes"],
            nlohmann::json::parse(R"([{"outcome":"compressed","reason":"none","count":2}])"));
  EXPECT_GT(gated["bytes_before"], gated["bytes_after"]);
  const nlohmann::json& full = document["operations"][1];
  EXPECT_TRUE(full["table"].is_null());
  EXPECT_EQ(full["outcomes"][0]["reason"], "below_budget");
  EXPECT_EQ(full["kept_tokens"], full["input_tokens"]);
  const CliRun text = RunBinary({"info", "--server", "unix:" + Path("k.sock"), "--statistics"});
  EXPECT_THAT(text.out, HasSubstr("compilerkv  golden-cli@"));
  EXPECT_THAT(text.out, HasSubstr("2  compressed"));
}

TEST_F(ServerTest, StatisticsOfASessionAreItsOwn) {
  ASSERT_FALSE(Result({"--policy", "tova", "--budget", "12"}, Server("inline")).empty());
  client::ClientOptions options;
  options.address = "unix:" + Path("k.sock");
  const auto client = client::Client::Connect(options);
  ASSERT_TRUE(client.ok()) << client.status();
  const auto own = (*client)->GetStatistics(client::StatisticsOf::kSession);
  ASSERT_TRUE(own.ok()) << own.status();
  EXPECT_THAT(own->operations, IsEmpty());
  EXPECT_EQ(own->sessions, 1);
  const auto all = (*client)->GetStatistics(client::StatisticsOf::kServer);
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_EQ(all->operations.size(), 1u);
  options.transport = client::Transport::kInline;
  const auto inline_client = client::Client::Connect(options);
  ASSERT_TRUE(inline_client.ok());
  EXPECT_EQ((*inline_client)->GetStatistics(client::StatisticsOf::kSession).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(ServerTest, HealthTellsLiveReadyAndModels) {
  const std::string server = "unix:" + Path("k.sock");
  for (const std::vector<std::string>& service :
       {std::vector<std::string>{}, {"--service", "keepset.v1.CompressionService"}}) {
    std::vector<std::string> arguments = {"health", "--server", server};
    arguments.insert(arguments.end(), service.begin(), service.end());
    const CliRun run = RunBinary(arguments);
    EXPECT_EQ(run.exit_code, 0) << run.err;
    EXPECT_EQ(run.out, "serving\n");
  }
}

TEST_F(ServerTest, HealthOfAnUnknownServiceIsRefused) {
  const CliRun run =
      RunBinary({"health", "--server", "unix:" + Path("k.sock"), "--service", "nothing"});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, HasSubstr("nothing"));
}

TEST_F(ServerTest, HealthOfADrainingServerIsLiveButNotReady) {
  server_->StartDraining();
  const std::vector<std::string> live = {"health", "--server", "unix:" + Path("k.sock")};
  EXPECT_EQ(RunBinary(live).exit_code, 0);
  std::vector<std::string> ready = live;
  for (const char* flag : {"--service", "keepset.v1.CompressionService"}) {
    ready.emplace_back(flag);
  }
  EXPECT_EQ(RunBinary(ready).exit_code, 4);
}

TEST_F(ServerTest, HealthOfNobodyIsUnreachable) {
  const CliRun run = RunBinary({"health", "--server", "unix:" + Path("nobody.sock")});
  EXPECT_EQ(run.exit_code, 4);
  EXPECT_TRUE(IsOneLine(run.err)) << run.err;
}

TEST_F(ServerTest, TableThatIsNotActiveIsRefused) {
  ASSERT_EQ(RunBinary({"tables", "uniform", "--like", Golden("cli_capture.safetensors"), "--name",
                       "other", "--version", "1", "--out", Path("other")})
                .exit_code,
            0);
  std::vector<std::string> flags = {"--policy", "compilerkv", "--budget", "12",
                                    "--ppl",    "3",          "--table",  Path("other")};
  for (const std::string& flag : Server("auto")) flags.push_back(flag);
  const CliRun run = Compress(flags);
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_TRUE(IsOneLine(run.err)) << run.err;
  EXPECT_THAT(run.err, AllOf(HasSubstr(Path("other")), HasSubstr("not active")));
}

TEST_F(ServerTest, UnknownPolicyAndParameterAreUsage) {
  for (const std::vector<std::string>& wrong :
       {std::vector<std::string>{"--policy", "nothing"},
        std::vector<std::string>{"--policy", "tova", "--param", "nothing=1"}}) {
    std::vector<std::string> flags = wrong;
    for (const char* flag : {"--budget", "12"}) flags.emplace_back(flag);
    for (const std::string& flag : Server("auto")) flags.push_back(flag);
    const CliRun run = Compress(flags);
    EXPECT_EQ(run.exit_code, 2);
    EXPECT_THAT(run.err, HasSubstr("nothing"));
  }
}

TEST_F(ServerTest, MissingPerplexityIsRefused) {
  std::vector<std::string> flags = {"--policy", "compilerkv", "--budget", "12"};
  for (const std::string& flag : Server("auto")) flags.push_back(flag);
  const CliRun run = Compress(flags);
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, HasSubstr("--ppl X"));
}

TEST_F(ServerTest, DrainingServerIsUnreachable) {
  server_->StartDraining();
  std::vector<std::string> flags = {"--policy", "tova", "--budget", "12"};
  for (const std::string& flag : Server("inline")) flags.push_back(flag);
  EXPECT_EQ(Compress(flags).exit_code, 4);
}

TEST_F(ServerTest, BenchServiceMeasuresEveryPath) {
  const CliRun run =
      RunBinary({"bench", "service", "--server", "unix:" + Path("k.sock"), "--repeats", "1"});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  for (const char* part : {R"("transport":"memfd","rpc":"unary","layers":1)",
                           R"("transport":"memfd","rpc":"stream","layers":32)",
                           R"("transport":"inline","rpc":"unary","layers":32)",
                           R"("transport":"inline","rpc":"stream","layers":1)"}) {
    EXPECT_THAT(run.out, HasSubstr(part));
  }
}

TEST_F(ServerTest, ClientReportsTheTransportItGot) {
  client::ClientOptions options;
  options.address = "unix:" + Path("k.sock");
  const auto client = client::Client::Connect(options);
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_EQ((*client)->transport(), client::Transport::kMemfd);
}

TEST_F(ServerTest, ClientReopensItsSession) {
  client::ClientOptions options;
  options.address = "unix:" + Path("k.sock");
  const auto client = client::Client::Connect(options);
  ASSERT_TRUE(client.ok()) << client.status();
  const auto region = client::SharedRegion::Create("test", 4096);
  ASSERT_TRUE(region.ok());
  ASSERT_TRUE((*client)->RegisterRegion(**region, "kv", client::RegionAccess::kReadOnly).ok());
  EXPECT_TRUE((*client)->Reopen().ok());
  EXPECT_TRUE((*client)->RetireRegion("kv").ok());
}

}  // namespace
}  // namespace keepset::cli
