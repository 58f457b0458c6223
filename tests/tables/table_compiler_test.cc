#include "tables/table_compiler.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/tables/record_samples.h"
#include "tests/tables/table_samples.h"

namespace keepset::tables {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Json = nlohmann::json;

CompileOptions Options() {
  CompileOptions options;
  options.name = "t";
  options.version = "1";
  options.model = SmallModel();
  options.bins = {2, 2};
  options.num_threads = 1;
  options.created = absl::FromUnixSeconds(1700000000);
  options.tool_version = "0";
  return options;
}

class TableCompiler : public ::testing::Test {
 protected:
  std::string File(const std::string& name, const std::string& text) {
    WriteText(directory_.Path(name), text);
    return directory_.Path(name);
  }
  absl::StatusOr<CompiledTable> Compile(const std::string& text,
                                        const CompileOptions& options = Options()) {
    return CompileTable({File("records.jsonl", text)}, options, nullptr);
  }
  std::string ErrorOf(const std::string& text, const CompileOptions& options = Options()) {
    const absl::StatusOr<CompiledTable> table = Compile(text, options);
    EXPECT_FALSE(table.ok());
    return std::string(table.status().message());
  }

  TemporaryDirectory directory_;
};

// Two good records: budgets agree.
std::string Minimal() { return JoinLines({HeadRecord().dump(), GateRecord().dump()}); }

TEST_F(TableCompiler, FindsThePreferredActionOfEveryState) {
  const absl::StatusOr<CompiledTable> table =
      Compile(JoinLines(RandomRecords(2 * kRecordsPerRound, 1)));
  ASSERT_TRUE(table.ok()) << table.status();
  const CompilerKvTableContent& content = table->content;
  EXPECT_THAT(content.budgets, ElementsAre(64, 128));
  std::vector<float> heads;
  for (const int64_t budget : content.budgets) {
    for (int64_t layer = 0; layer < 2; ++layer) {
      for (int64_t head = 0; head < 4; ++head) {
        heads.push_back(kHeadActions.Value(PreferredHeadAction(budget, layer, head)));
      }
    }
  }
  EXPECT_EQ(content.head_weights, heads);
  EXPECT_EQ(content.gate_thresholds,
            std::vector<float>(2 * 2 * 4, kGateActions.Value(kPreferredGateAction)));
}

TEST_F(TableCompiler, ResultIsAValidTableFileWithItsProvenance) {
  const absl::StatusOr<CompiledTable> table = Compile(Minimal());
  ASSERT_TRUE(table.ok()) << table.status();
  const absl::StatusOr<std::string> bytes = SerializeTable(table->content);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  const auto parsed = ParseTable(AsBytes(*bytes), "t");
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ((*parsed)->provenance_source(), "offline-calibration");
  const Json provenance = Json::parse((*parsed)->metadata_json())["provenance"];
  EXPECT_EQ(provenance["created"], "2023-11-14T22:13:20Z");
  EXPECT_EQ(provenance["records_per_state"]["head"], 1);
  EXPECT_EQ(provenance["paired_policy_counts"]["g-1"], 1);
}

TEST_F(TableCompiler, CalibrationDigestIsTheShaOfTheBytes) {
  // sha256 of one line end, which is a file of blank lines only.
  const absl::StatusOr<std::string> summary =
      SummarizeRecords({File("records.jsonl", "\n")}, {1, 1}, {}, 1, nullptr);
  ASSERT_TRUE(summary.ok()) << summary.status();
  EXPECT_EQ(Json::parse(*summary)["digest"],
            "sha256:01ba4719c80b6fe911b091a7c05124b64eeece964e09c058ef8f9805daca546b");
}

TEST_F(TableCompiler, UnsupportedStatesAreNeutralAndCounted) {
  const absl::StatusOr<CompiledTable> table = Compile(Minimal());
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_THAT(table->content.head_weights,
              ElementsAre(1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.125f, 1.0f));
  EXPECT_EQ(std::count(table->content.gate_thresholds.begin(), table->content.gate_thresholds.end(),
                       0.8f),
            7);
  const Json report = Json::parse(table->report_json);
  EXPECT_EQ(report["head"]["supported_states"], 1);
  EXPECT_EQ(report["head"]["unsupported_states"], 7);
  EXPECT_EQ(report["gate"]["unsupported_states"], 7);
  EXPECT_EQ(report["head"]["single_action_states"], 1);
}

TEST_F(TableCompiler, OrderOfRecordsDoesNotChangeATableBit) {
  std::vector<std::string> lines = RandomRecords(4000, 2);
  const absl::StatusOr<CompiledTable> straight = Compile(JoinLines(lines));
  std::shuffle(lines.begin(), lines.end(), std::mt19937_64(5));
  const absl::StatusOr<CompiledTable> shuffled = Compile(JoinLines(lines));
  ASSERT_TRUE(straight.ok() && shuffled.ok());
  EXPECT_EQ(straight->content.head_weights, shuffled->content.head_weights);
  EXPECT_EQ(straight->content.gate_thresholds, shuffled->content.gate_thresholds);
  EXPECT_EQ(straight->content.entropy_edges, shuffled->content.entropy_edges);
  Json a = Json::parse(straight->report_json);
  Json b = Json::parse(shuffled->report_json);
  a.erase("calibration_digest");
  b.erase("calibration_digest");
  EXPECT_EQ(a, b);
}

TEST_F(TableCompiler, AnyNumberOfThreadsGivesTheSameTableAndReport) {
  // Above one block of text, so that several threads do read.
  const std::string text = JoinLines(RandomRecords(30000, 3));
  const absl::StatusOr<CompiledTable> one = Compile(text);
  CompileOptions options = Options();
  options.num_threads = 5;
  const absl::StatusOr<CompiledTable> five = Compile(text, options);
  ASSERT_TRUE(one.ok() && five.ok());
  EXPECT_EQ(one->report_json, five->report_json);
  EXPECT_EQ(SerializeTable(one->content).value(), SerializeTable(five->content).value());
}

TEST_F(TableCompiler, SeveralFilesAreReadAsOne) {
  const std::vector<std::string> lines = RandomRecords(400, 4);
  const std::string first = File("a", JoinLines({lines.begin(), lines.begin() + 150}));
  const std::string second = File("b", JoinLines({lines.begin() + 150, lines.end()}));
  const absl::StatusOr<CompiledTable> split = CompileTable({first, second}, Options(), nullptr);
  const absl::StatusOr<CompiledTable> whole = Compile(JoinLines(lines));
  ASSERT_TRUE(split.ok() && whole.ok());
  EXPECT_EQ(split->report_json, whole->report_json);
}

TEST_F(TableCompiler, KvHeadRecordsFillTheirWholeGroup) {
  Json record = HeadRecord();
  record.erase("head");
  record["kv_head"] = 1;
  const absl::StatusOr<CompiledTable> table =
      Compile(JoinLines({record.dump(), GateRecord().dump()}));
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_THAT(table->content.head_weights,
              ElementsAre(1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.125f, 1.125f));
}

TEST_F(TableCompiler, HeadAndKvHeadInOneRunAreRefused) {
  Json record = HeadRecord();
  record.erase("head");
  record["kv_head"] = 1;
  EXPECT_THAT(ErrorOf(JoinLines({HeadRecord().dump(), record.dump()})),
              AllOf(HasSubstr("line 2"), HasSubstr("kv_head")));
}

TEST_F(TableCompiler, BudgetsOfHeadAndGateRecordsMustAgree) {
  Json gate = GateRecord();
  gate["budget"] = 128;
  EXPECT_THAT(ErrorOf(JoinLines({HeadRecord().dump(), gate.dump()})),
              AllOf(HasSubstr("head records cover 64"), HasSubstr("gate records 128")));
}

TEST_F(TableCompiler, OnlyOneKindOfRecordIsRefused) {
  EXPECT_THAT(ErrorOf(HeadRecord().dump()), HasSubstr("gate records none"));
}

TEST_F(TableCompiler, AnEmptyFileIsRefused) {
  EXPECT_THAT(ErrorOf(""), HasSubstr("head records cover none"));
}

TEST_F(TableCompiler, ABadLineIsNamedByFileLineAndField) {
  Json bad = HeadRecord();
  bad["layer"] = 7;
  EXPECT_THAT(ErrorOf("\n\n" + Minimal() + bad.dump() + "\n"),
              AllOf(HasSubstr("records.jsonl: line 5: "), HasSubstr("layer=7, want an integer")));
}

TEST_F(TableCompiler, TheFirstBadLineIsNamedWhateverTheThreads) {
  std::vector<std::string> lines = RandomRecords(40000, 6);
  lines[300] = "{}";
  lines[39000] = "{}";
  CompileOptions options = Options();
  options.num_threads = 4;
  EXPECT_THAT(ErrorOf(JoinLines(lines), options), HasSubstr("line 301: kind=(missing)"));
}

TEST_F(TableCompiler, ADuplicateRecordIsNamed) {
  EXPECT_THAT(ErrorOf(Minimal() + HeadRecord().dump() + "\n"),
              AllOf(HasSubstr("line 3"), HasSubstr("repeats an earlier record")));
}

TEST_F(TableCompiler, AFileCutInALineIsNamedAsSuch) {
  const std::string text = Minimal();
  EXPECT_THAT(ErrorOf(text.substr(0, text.size() - 20)),
              AllOf(HasSubstr("line 2"), HasSubstr("the file ends inside this line")));
}

TEST_F(TableCompiler, AWholeLastLineNeedsNoLineEnd) {
  const std::string text = Minimal();
  EXPECT_TRUE(Compile(text.substr(0, text.size() - 1)).ok());
}

TEST_F(TableCompiler, RejectionsAreCountedUpToTheStatedNumber) {
  CompileOptions options = Options();
  options.limits.max_rejected = 2;
  const std::string text = Minimal() + HeadRecord().dump() + "\nnonsense\n";
  const absl::StatusOr<CompiledTable> table = Compile(text, options);
  ASSERT_TRUE(table.ok()) << table.status();
  const Json records = Json::parse(table->report_json)["records"];
  EXPECT_EQ(records["rejected"], 2);
  EXPECT_EQ(records["duplicates"], 1);
  EXPECT_THAT(records["first_rejections"][1].get<std::string>(), HasSubstr("line 4"));
  options.limits.max_rejected = 1;
  EXPECT_THAT(ErrorOf(text, options), HasSubstr("more than 1 records rejected"));
}

TEST_F(TableCompiler, TooManyStatesAreATypedError) {
  CompileOptions options = Options();
  options.limits.max_states = 3;
  EXPECT_TRUE(
      absl::IsResourceExhausted(Compile(JoinLines(RandomRecords(200, 1)), options).status()));
}

TEST_F(TableCompiler, TooManyRecordsAreATypedError) {
  CompileOptions options = Options();
  options.limits.max_gate_records = 10;
  EXPECT_TRUE(
      absl::IsResourceExhausted(Compile(JoinLines(RandomRecords(200, 1)), options).status()));
}

TEST_F(TableCompiler, IndependentRecordsMustBeAllowedAndAreNamedInTheProvenance) {
  Json head = HeadRecord();
  head.erase("paired_policy");
  const std::string text = JoinLines({head.dump(), GateRecord().dump()});
  EXPECT_THAT(ErrorOf(text), HasSubstr("paired_policy=(missing)"));
  CompileOptions options = Options();
  options.paired_policy = PairedPolicyRule::kOptional;
  const absl::StatusOr<CompiledTable> table = Compile(text, options);
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_EQ(Json::parse(table->content.provenance_json)["source"], "offline-independent-ablation");
}

TEST_F(TableCompiler, ComparisonSaysWhereTheSolversDisagree) {
  // An optimiser that does not move leaves every value at 0 and chooses the first action.
  std::vector<std::string> lines = {GateRecord().dump()};
  for (int i = 0; i < 2; ++i) {
    Json record = HeadRecord();
    record["action"] = i == 0 ? 0.8 : 1.5;
    record["compressed_loss"] = i == 0 ? 0.5 : 1.5;
    lines.push_back(record.dump());
  }
  CompileOptions options = Options();
  options.comparison = SolverComparison::kCompare;
  options.adam.learning_rate = 0;
  const absl::StatusOr<CompiledTable> table = Compile(JoinLines(lines), options);
  ASSERT_TRUE(table.ok()) << table.status();
  const Json comparison = Json::parse(table->report_json)["comparison"];
  EXPECT_EQ(comparison["head"]["different_states"], 0);
  ASSERT_EQ(comparison["gate"]["different_states"], 1);
  EXPECT_EQ(comparison["gate"]["first_differences"][0]["exact"], 0.9);
  EXPECT_EQ(comparison["gate"]["first_differences"][0]["adam"], 0.8);
}

TEST_F(TableCompiler, AdamSolverFillsTheTableAndSaysSo) {
  CompileOptions options = Options();
  options.solver = TableSolver::kAdam;
  const absl::StatusOr<CompiledTable> table = Compile(Minimal(), options);
  ASSERT_TRUE(table.ok()) << table.status();
  const Json algorithm = Json::parse(table->content.algorithm_json);
  EXPECT_EQ(algorithm["solver"], "adam");
  EXPECT_EQ(algorithm["seed"], 42);
}

TEST_F(TableCompiler, DefaultBudgetMustBeCompiled) {
  CompileOptions options = Options();
  options.default_budget = 65;
  EXPECT_THAT(ErrorOf(Minimal(), options), HasSubstr("default_budget=65, want one of 64"));
}

TEST_F(TableCompiler, AnotherGridIsTakenAndDeclared) {
  Json record = HeadRecord();
  record["action"] = 3.0;
  EXPECT_THAT(ErrorOf(JoinLines({record.dump(), GateRecord().dump()})),
              HasSubstr("action=3.0, want one of 0.8..1.5"));
  CompileOptions options = Options();
  options.actions.head = {0.5, 0.5, 8};
  const absl::StatusOr<CompiledTable> table =
      Compile(JoinLines({record.dump(), GateRecord().dump()}), options);
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_THAT(table->content.head_weights, Contains(3.0f));
  EXPECT_EQ(table->content.head_grid, std::pair(0.5f, 4.0f));
  EXPECT_FALSE(table->content.gate_grid.has_value());
  // What the reader would refuse, the writer does.
  EXPECT_TRUE(SerializeTable(table->content).ok());
}

TEST_F(TableCompiler, GridsWithoutTwoPositiveValuesAreRefused) {
  for (const ActionGrid grid : {ActionGrid{0, 0.1, 5}, ActionGrid{1, 0, 5}, ActionGrid{1, 0.1, 1},
                                ActionGrid{1, 0.1, 65}, ActionGrid{1, 500, 5}}) {
    CompileOptions options = Options();
    options.actions.gate = grid;
    EXPECT_THAT(ErrorOf(Minimal(), options), HasSubstr("gate_actions="));
  }
}

TEST_F(TableCompiler, OptionsOutOfRangeAreRefused) {
  CompileOptions options = Options();
  options.conservative_weight = -1;
  EXPECT_THAT(ErrorOf(Minimal(), options), HasSubstr("conservative_weight=-1"));
  options = Options();
  options.bins.ppl = 0;
  EXPECT_THAT(ErrorOf(Minimal(), options), HasSubstr("ppl_bins=0"));
}

TEST_F(TableCompiler, ProgressEndsAtTheWholeFile) {
  const std::string path = File("records.jsonl", Minimal());
  int64_t done = 0;
  int64_t total = -1;
  ASSERT_TRUE(CompileTable({path}, Options(), [&](int64_t bytes_done, int64_t bytes_total) {
                done = bytes_done;
                total = bytes_total;
              }).ok());
  EXPECT_EQ(done, Minimal().size());
  EXPECT_EQ(total, Minimal().size());
}

TEST_F(TableCompiler, SummaryCountsWhatIsGoodAndWhatIsNot) {
  Json far = GateRecord();
  far["seed"] = 1;
  far["entropy"] = 2.0;
  const std::string path = File("records.jsonl", Minimal() + far.dump() + "\nnonsense\n");
  const absl::StatusOr<std::string> text = SummarizeRecords({path}, {2, 1}, {}, 1, nullptr);
  ASSERT_TRUE(text.ok()) << text.status();
  const Json summary = Json::parse(*text);
  EXPECT_EQ(summary["records"]["accepted"], 3);
  EXPECT_EQ(summary["records"]["rejected"], 1);
  EXPECT_EQ(summary["head"]["per_state"][0]["head"], 2);
  EXPECT_EQ(summary["head"]["actions"][13]["records"], 1);
  EXPECT_EQ(summary["coverage"]["records_per_cell"], Json::parse("[[1], [1]]"));
}

TEST(QuantileEdges, InterpolateLinearly) {
  std::vector<double> values = {4, 1, 3, 2};
  EXPECT_THAT(QuantileEdges(values, 4), ElementsAre(1.75f, 2.5f, 3.25f));
}

TEST(QuantileEdges, AgreeWithAPlainOracle) {
  std::mt19937_64 random(9);
  std::vector<double> values(997);
  for (double& value : values) value = static_cast<double>(random() % 100000) / 977;
  std::vector<double> sorted = values;
  std::sort(sorted.begin(), sorted.end());
  const std::vector<float> edges = QuantileEdges(values, 20);
  ASSERT_EQ(edges.size(), 19);
  for (int i = 1; i < 20; ++i) {
    const long double position = 996.0L * i / 20;
    const auto below = static_cast<int>(position);
    const long double oracle =
        sorted[below] + (position - below) * (sorted[below + 1] - sorted[below]);
    EXPECT_FLOAT_EQ(edges[i - 1], static_cast<float>(oracle));
  }
}

TEST(QuantileEdges, OneBinHasNone) {
  std::vector<double> values = {1, 2};
  EXPECT_THAT(QuantileEdges(values, 1), ElementsAre());
}

TEST(StateStatistics, SumsDoNotDependOnTheOrder) {
  std::mt19937_64 random(21);
  std::vector<double> rewards(1000);
  for (double& reward : rewards) reward = std::ldexp(static_cast<double>(random() % 1000), -12);
  rewards[0] = 1e5;
  const auto mean_of = [](const std::vector<double>& values) {
    StateStatistics states(1, 10);
    for (const double value : values) EXPECT_TRUE(states.Add({1, 0, 0}, 0, value).ok());
    return states.MeanRewards(0)[0];
  };
  const double straight = mean_of(rewards);
  std::reverse(rewards.begin(), rewards.end());
  EXPECT_EQ(mean_of(rewards), straight);
}

TEST(StateStatistics, VarianceIsWithinActions) {
  StateStatistics states(2, 10);
  for (const double reward : {1.0, 3.0}) {
    EXPECT_TRUE(states.Add({1, 0, 0}, 0, reward).ok());
    EXPECT_TRUE(states.Add({1, 0, 0}, 1, reward + 100).ok());
  }
  EXPECT_NEAR(states.RewardVariance(0), 1.0, 1e-9);
}

}  // namespace
}  // namespace keepset::tables
