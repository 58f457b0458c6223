#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/clients/cli_runner.h"

namespace keepset::cli {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Json = nlohmann::json;

constexpr const char* kHead =
    R"({"kind":"head","prompt_id":"p","layer":0,"head":1,"budget":9,"action":1.25,"full_loss":1,)"
    R"("compressed_loss":1.5,"sequence_length":64,"paired_policy":"g"})";
constexpr const char* kGate =
    R"({"kind":"gate","prompt_id":"p","layer":0,"budget":9,"action":0.85,"full_loss":1,)"
    R"("compressed_loss":1.5,"sequence_length":64,"entropy":3,"ppl":7,"candidate_count":9,)"
    R"("paired_policy":"h"})";

class TablesCompile : public CliTest {
 protected:
  std::string Records(const std::vector<std::string>& lines) {
    std::ofstream file(Path("records"));
    for (const std::string& line : lines) file << line << "\n";
    return Path("records");
  }
  CliRun Compile(const std::string& records, const std::vector<std::string>& more = {}) {
    std::vector<std::string> words = {
        "tables",     "compile",    records,     "--like", Golden("cli_capture.safetensors"),
        "--name",     "calibrated", "--version", "1",      "-o",
        Path("table")};
    words.insert(words.end(), more.begin(), more.end());
    return RunBinary(words);
  }
};

TEST_F(TablesCompile, MakesATableThatServesItsCapture) {
  const CliRun run = Compile(Records({kHead, kGate}), {"--json", "--created", "1700000000"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const Json written = Json::parse(run.out);
  EXPECT_EQ(written["report"]["head"]["supported_states"], 1);
  const CliRun inspect = RunBinary({"tables", "inspect", Path("table"), "--json"});
  EXPECT_EQ(Json::parse(inspect.out)["digest"], written["digest"]);
  EXPECT_EQ(Json::parse(inspect.out)["provenance"]["source"], "offline-calibration");
  EXPECT_EQ(
      Compress({"--policy", "compilerkv", "--budget", "9", "--ppl", "7", "--table", Path("table")})
          .exit_code,
      0);
}

TEST_F(TablesCompile, OtherActionsAreTakenAndDeclaredInTheTable) {
  const CliRun run = Compile(Records({kHead, kGate}), {"--head-actions", "0.25:0.25:16", "--json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(Json::parse(run.out)["report"]["algorithm"]["head_actions"]["count"], 16);
  EXPECT_EQ(RunBinary({"tables", "validate", Path("table")}).exit_code, 0);
}

TEST_F(TablesCompile, ActionsThatAreNoGridAreUsageAndImpossibleOnesRefused) {
  const std::string records = Records({kHead, kGate});
  const CliRun usage = Compile(records, {"--gate-actions", "0.8:0.01"});
  EXPECT_EQ(usage.exit_code, 2);
  EXPECT_THAT(usage.err, HasSubstr("want FIRST:STEP:COUNT"));
  EXPECT_EQ(Compile(records, {"--gate-actions", "0.8:0.01:900"}).exit_code, 3);
  EXPECT_THAT(Files(), testing::ElementsAre("records"));
}

TEST_F(TablesCompile, SameRecordsAndTimeGiveTheSameFile) {
  const std::string records = Records({kHead, kGate});
  const CliRun first = Compile(records, {"--json", "--created", "5"});
  const CliRun second = Compile(records, {"--json", "--created", "5", "--threads", "3"});
  EXPECT_EQ(Json::parse(first.out)["digest"], Json::parse(second.out)["digest"]);
}

TEST_F(TablesCompile, ABadRecordIsRefusedAndLeavesNoTable) {
  const CliRun run = Compile(Records({kHead, kGate, R"({"kind":"head"})"}));
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_TRUE(IsOneLine(run.err)) << run.err;
  EXPECT_THAT(run.err, AllOf(HasSubstr("line 3"), HasSubstr("prompt_id")));
  EXPECT_THAT(Files(), ::testing::ElementsAre("records"));
}

TEST_F(TablesCompile, OutOfARecordFileIsUsageAndLeavesItAsItIs) {
  const std::string records = Records({kHead, kGate});
  const auto size = std::filesystem::file_size(records);
  const CliRun run =
      RunBinary({"tables", "compile", records, "--like", Golden("cli_capture.safetensors"),
                 "--name", "n", "--version", "1", "-o", records});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("is the same file as the records " + records));
  EXPECT_EQ(std::filesystem::file_size(records), size);
}

TEST_F(TablesCompile, OutOfAnObservationRecordIsUsage) {
  const std::string record = Golden("cli_capture.safetensors");
  std::filesystem::create_symlink(record, Path("table"));
  const CliRun run =
      RunBinary({"tables", "compile", "--kind", "observation_heads", record, record, "--budget",
                 "2", "--name", "n", "--version", "1", "-o", Path("table")});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("is the same file as the records"));
}

TEST_F(TablesCompile, AMissingRecordFileIsUsage) {
  EXPECT_EQ(Compile(Path("nowhere")).exit_code, 2);
}

TEST_F(TablesCompile, AnUnknownSolverIsUsage) {
  const CliRun run = Compile(Records({kHead, kGate}), {"--solver", "magic"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("want exact or adam"));
}

TEST_F(TablesCompile, AWeightOutOfRangeIsRefused) {
  const CliRun run = Compile(Records({kHead, kGate}), {"--conservative-weight", "-1"});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, HasSubstr("conservative_weight=-1"));
}

TEST_F(TablesCompile, ComparisonIsInTheReport) {
  const CliRun run = Compile(Records({kHead, kGate}), {"--compare-solvers"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.out, HasSubstr("adam chooses otherwise"));
}

TEST_F(TablesCompile, IndependentRecordsNeedTheirSwitch) {
  Json head = Json::parse(kHead);
  head.erase("paired_policy");
  const std::string records = Records({head.dump(), kGate});
  EXPECT_EQ(Compile(records).exit_code, 3);
  EXPECT_EQ(Compile(records, {"--allow-independent-records"}).exit_code, 0);
}

TEST_F(TablesCompile, RecordsCountsGoodAndBadLines) {
  const CliRun run =
      RunBinary({"tables", "records", Records({kHead, kGate, kHead, "{"}), "--json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.err, IsEmpty());
  const Json records = Json::parse(run.out)["records"];
  EXPECT_EQ(records["accepted"], 2);
  EXPECT_EQ(records["rejected"], 2);
  EXPECT_EQ(records["duplicates"], 1);
}

TEST_F(TablesCompile, RecordsForPeopleShowsTheCoverage) {
  const CliRun run = RunBinary({"tables", "records", Records({kHead, kGate})});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.out,
              AllOf(HasSubstr("risk cells with records: 1 of 80"), HasSubstr("action 1.250  1")));
}

class CompileHeads : public CliTest {
 protected:
  CliRun Compile(const std::vector<std::string>& more) {
    std::vector<std::string> words = {"tables",
                                      "compile",
                                      "--kind",
                                      "observation_heads",
                                      Golden("public_library_observations.safetensors"),
                                      "--name",
                                      "heads",
                                      "--version",
                                      "1",
                                      "-o",
                                      Path("table")};
    words.insert(words.end(), more.begin(), more.end());
    return RunBinary(words);
  }
};

TEST_F(CompileHeads, WantsABudget) {
  const CliRun run = Compile({});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("--budget is missing"));
}

TEST_F(CompileHeads, OneRecordIsRefused) {
  const CliRun run = Compile({"--budget", "2"});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, HasSubstr("records: 1, want at least 2"));
}

TEST_F(CompileHeads, FlagsOutOfRangeAreRefused) {
  for (const char* flag : {"--threads=-1", "--default-budget=0", "--created=0"}) {
    const CliRun run = Compile({"--budget", "4", flag});
    EXPECT_EQ(run.exit_code, 3) << flag;
    EXPECT_THAT(run.err, HasSubstr(flag));
  }
}

TEST_F(CompileHeads, ABudgetIsAnInteger) { EXPECT_EQ(Compile({"--budget", "many"}).exit_code, 2); }

TEST_F(TablesCompile, AnUnknownKindIsNamed) {
  const CliRun run = Compile(Records({kHead}), {"--kind", "others"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("--kind=others, want compilerkv or observation_heads"));
}

TEST_F(CompileHeads, ASpanOfRowsIsTheParameterObserve) {
  const CliRun run =
      CliTest::Compress({"--policy", "tova", "--budget", "4", "--observe-span", "system"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("unknown parameter observe=3:6"));
}

}  // namespace
}  // namespace keepset::cli
