// What every command has in common: help, unknown words, where output goes.
#include <string>
#include <vector>

#include "absl/strings/str_split.h"
#include "clients/cli/command_list.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/clients/cli_runner.h"

namespace keepset::cli {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;

TEST(KeepsetUsage, HelpListsEveryCommand) {
  const CliRun run = RunBinary({"--help"});
  EXPECT_EQ(run.exit_code, 0);
  for (const Command& command : Commands()) {
    EXPECT_THAT(run.out, HasSubstr(std::string(command.name)));
  }
}

TEST(KeepsetUsage, EveryCommandHasHelp) {
  for (const Command& command : Commands()) {
    const CliRun run = RunBinary({std::string(command.name), "--help"});
    EXPECT_EQ(run.exit_code, 0) << command.name;
    EXPECT_THAT(run.out, StartsWith("usage: keepset " + std::string(command.name)));
  }
}

TEST(KeepsetUsage, VersionNamesTheProgram) {
  const CliRun run = RunBinary({"--version"});
  EXPECT_EQ(run.exit_code, 0);
  EXPECT_THAT(run.out, StartsWith("keepset "));
}

TEST(KeepsetUsage, NoCommandIsUsage) { EXPECT_EQ(RunBinary({}).exit_code, 2); }

TEST(KeepsetUsage, UnknownCommandSuggestsOne) {
  const CliRun run = RunBinary({"compres"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.out, IsEmpty());
  EXPECT_THAT(run.err, HasSubstr("did you mean compress?"));
}

TEST(KeepsetUsage, InfoWithoutServerIsUsage) {
  const CliRun run = RunBinary({"info"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("--server"));
}

TEST(KeepsetUsage, InfoOfAnAddressWithoutSchemeIsUsage) {
  EXPECT_EQ(RunBinary({"info", "--server", "keepset.sock"}).exit_code, 2);
  EXPECT_EQ(RunBinary({"health", "--server", "keepset.sock"}).exit_code, 2);
}

TEST(KeepsetUsage, InfoOfASilentAddressIsUnreachable) {
  EXPECT_EQ(RunBinary({"info", "--server", "unix:/nonexistent/keepset.sock"}).exit_code, 4);
}

TEST(RegistryUsage, ActivateWantsAVersion) {
  const CliRun run = RunBinary({"registry", "activate", "tiny", "--server", "unix:/nowhere.sock"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("NAME@VERSION"));
}

TEST(RegistryUsage, RollbackTakesANameAlone) {
  EXPECT_EQ(
      RunBinary({"registry", "rollback", "tiny@1", "--server", "unix:/nowhere.sock"}).exit_code, 2);
}

TEST(RegistryUsage, CanaryWantsAShareOrItsEnd) {
  const CliRun run = RunBinary({"registry", "canary", "tiny@1", "--server", "unix:/nowhere.sock"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("--percent"));
}

TEST(RegistryUsage, ShareOutOfRangeNamesTheRange) {
  const CliRun run = RunBinary(
      {"registry", "canary", "tiny@1", "--percent", "120", "--server", "unix:/nowhere.sock"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("0.01..100"));
}

TEST(RegistryUsage, LoadOfAMissingFileIsUsage) {
  EXPECT_EQ(
      RunBinary({"registry", "load", "/nowhere.safetensors", "--server", "unix:/nowhere.sock"})
          .exit_code,
      2);
}

TEST(RegistryUsage, SilentServerIsUnreachable) {
  EXPECT_EQ(RunBinary({"registry", "list", "--server", "unix:/nowhere.sock"}).exit_code, 4);
}

TEST(RegistryUsage, UnknownSubcommandSuggestsOne) {
  const CliRun run = RunBinary({"registry", "rolback"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("did you mean rollback?"));
}

TEST(KeepsetUsage, TlsFlagsWithoutTlsAreUsage) {
  const CliRun run = RunBinary({"info", "--server", "localhost:1", "--tls-server-name", "x"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("--tls-ca"));
}

TEST(KeepsetUsage, ServerFlagsWithoutServerAreUsage) {
  const CliRun run = RunBinary(
      {"compress", "capture", "--policy", "full", "--out", "result", "--transport", "inline"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("--transport needs --server"));
}

TEST(KeepsetUsage, ShadowTableNeedsAServer) {
  const CliRun run = RunBinary({"compress", "capture", "--policy", "compilerkv", "--out", "result",
                                "--shadow-table", "candidate"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("--shadow-table needs --server"));
}

TEST(KeepsetUsage, HalfAShadowTableIsUsage) {
  const CliRun run = RunBinary({"compress", "capture", "--policy", "compilerkv", "--out", "result",
                                "--server", "unix:nowhere", "--shadow-table", "candidate@"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("candidate@"));
}

TEST(KeepsetUsage, TwoBudgetsAreUsage) {
  const CliRun run = RunBinary({"compress", "capture", "--policy", "full", "--out", "result",
                                "--budget", "1", "--kept-fraction", "0.5"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("exclude each other"));
}

TEST(KeepsetUsage, BenchEngineQuickPrintsOneJsonLine) {
  const CliRun run = RunBinary({"bench", "engine", "--quick"});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_TRUE(IsOneLine(run.out));
  EXPECT_THAT(run.out, HasSubstr("\"peak_gflops\""));
  EXPECT_THAT(run.out, HasSubstr("\"ratio_to_floor\""));
}

TEST(KeepsetUsage, BenchEngineLeavesOutLogitsThatNoPolicyReads) {
  for (const char* policy : {"streaming_llm", "knorm"}) {
    const CliRun run = RunBinary({"bench", "engine", "--quick", "--policy", policy});
    ASSERT_EQ(run.exit_code, 0) << run.err;
    const auto line = nlohmann::json::parse(run.out);
    for (const char* field :
         {"logits_gflops", "share_of_peak", "floor_seconds", "ratio_to_floor"}) {
      EXPECT_TRUE(line[field].is_null()) << policy << " " << line;
    }
    EXPECT_EQ(line["outcome"], "compressed");
  }
}

TEST(KeepsetUsage, BenchEngineCountsTheRowsThatThePolicyReads) {
  const auto gflop = [](const std::vector<std::string>& policy) {
    std::vector<std::string> words = {"bench", "engine", "--quick", "--policy"};
    words.insert(words.end(), policy.begin(), policy.end());
    const CliRun run = RunBinary(words);
    EXPECT_EQ(run.exit_code, 0) << run.err;
    const auto line = nlohmann::json::parse(run.out);
    return line["floor_seconds"].get<double>() * line["peak_gflops"].get<double>();
  };
  // 2 layers of 1024 tokens, head_dim 128; a multiply-add is two operations.
  const double row_of_a_head = 2e-9 * 1024 * 128;
  EXPECT_NEAR(gflop({"snapkv"}), row_of_a_head * 2 * 32 * 64, 1e-9);
  EXPECT_NEAR(gflop({"tova"}), row_of_a_head * 2 * 32 * 1, 1e-9);
  EXPECT_NEAR(gflop({"observation_heads", "--heads", "3"}), row_of_a_head * 3 * 64, 1e-9);
}

TEST(KeepsetUsage, BenchEngineRefusesPromptsThatAreKeptWhole) {
  const CliRun run = RunBinary({"bench", "engine", "--tokens", "512", "--policy", "snapkv"});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, HasSubstr("--tokens=512, want 513..1048576"));
}

TEST(KeepsetUsage, BenchEngineComparesTablesOfSeveralNumbersOfHeads) {
  const CliRun run = RunBinary({"bench", "engine", "--quick", "--policy", "observation_heads",
                                "--against", "snapkv", "--heads", "1,4,16"});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  const std::vector<std::string> lines = absl::StrSplit(run.out, '\n', absl::SkipEmpty());
  ASSERT_EQ(lines.size(), 4u) << run.out;
  EXPECT_EQ(nlohmann::json::parse(lines[0])["policy"], "snapkv");
  for (size_t i = 1; i < lines.size(); ++i) {
    const auto line = nlohmann::json::parse(lines[i]);
    EXPECT_EQ(line["policy"], "observation_heads");
    EXPECT_EQ(line["heads"], i == 1 ? 1 : i == 2 ? 4 : 16);
    EXPECT_GT(line["share_of_time_of_snapkv"], 0.0);
  }
}

TEST(KeepsetUsage, BenchEngineRefusesNumbersOfHeadsThatTheModelLacks) {
  const CliRun run =
      RunBinary({"bench", "engine", "--quick", "--policy", "observation_heads", "--heads", "1,65"});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, HasSubstr("--heads=1,65: 65, want 1..64"));
  EXPECT_EQ(RunBinary({"bench", "engine", "--heads", "many"}).exit_code, 2);
}

}  // namespace
}  // namespace keepset::cli
