#include "tables/decision_table.h"

#include <cmath>
#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tables/table_file.h"
#include "tests/tables/table_samples.h"

namespace keepset::tables {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kUnfit = absl::StatusCode::kFailedPrecondition;

void ExpectRefused(const LooseTable& table, absl::StatusCode code, absl::string_view message) {
  const auto parsed = table.Parse();
  EXPECT_EQ(parsed.status().code(), code) << parsed.status();
  EXPECT_THAT(std::string(parsed.status().message()), HasSubstr(std::string(message)));
  EXPECT_THAT(std::string(parsed.status().message()), HasSubstr("loose.safetensors"));
}

std::shared_ptr<const DecisionTable> Parsed(const CompilerKvTableContent& content) {
  const auto bytes = SerializeTable(content);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  auto table = ParseTable(AsBytes(*bytes), "small");
  EXPECT_TRUE(table.ok()) << table.status();
  return *table;
}

TEST(TableReader, AcceptsAPlainTable) {
  const auto table = LooseTable().Parse();
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_EQ((*table)->kind(), "compilerkv");
  EXPECT_EQ((*table)->identity().name, "loose");
  EXPECT_EQ((*table)->provenance_source(), "hand-written");
  EXPECT_THAT((*table)->ignored(), IsEmpty());
}

TEST(TableReader, AbsentKindMeansCompilerKv) {
  LooseTable table;
  table.document.erase("kind");
  EXPECT_TRUE(table.Parse().ok());
}

TEST(TableReader, RefusesAnUnknownKindByName) {
  LooseTable table;
  table.document["kind"] = "later_family";
  ExpectRefused(table, kUnfit, "kind=\"later_family\", want one of compilerkv, observation_heads");
}

TEST(TableReader, RefusesOtherFormats) {
  LooseTable table;
  table.document["format"] = "keepset.capture";
  ExpectRefused(table, kInvalid, "format=\"keepset.capture\", want keepset.table");
}

TEST(TableReader, RefusesNewerVersions) {
  LooseTable table;
  table.document["format_version"] = 2;
  ExpectRefused(table, kUnfit, "format_version=2, want at most 1");
}

TEST(TableReader, RefusesVersionsThatAreNoVersions) {
  LooseTable table;
  table.document["format_version"] = 0;
  ExpectRefused(table, kInvalid, "format_version=0");
  table.document["format_version"] = "1";
  ExpectRefused(table, kInvalid, "format_version=\"1\"");
}

TEST(TableReader, RefusesNamesUnfitForLabels) {
  for (const std::string& name : {std::string(), std::string("a b"), std::string("a\nb"),
                                  std::string("../x"), std::string(129, 'a')}) {
    LooseTable table;
    table.document["name"] = name;
    ExpectRefused(table, kInvalid, "name=");
    table.document["name"] = "fine";
    table.document["version"] = name;
    ExpectRefused(table, kInvalid, "version=");
  }
}

TEST(TableReader, RefusesNamesThatNoRequestCanAddress) {
  for (const char* name : {"line:stable", "line@2"}) {
    LooseTable table;
    table.document["name"] = name;
    ExpectRefused(table, kInvalid, "A-Z a-z 0-9 . _ - + / = with a letter or digit first");
  }
}

TEST(TableReader, RefusesVersionsThatReadLikeDigests) {
  LooseTable table;
  table.document["version"] = "sha256:1";
  ExpectRefused(table, kInvalid, "version=\"sha256:1\", want a version without sha256: in front");
  table.document["version"] = "2026-11-22T10:00@a";
  EXPECT_TRUE(table.Parse().ok()) << table.Parse().status();
}

TEST(TableWriter, RefusesNamesThatNoRequestCanAddress) {
  CompilerKvTableContent content = SmallTable();
  content.name = "line:stable";
  EXPECT_EQ(SerializeTable(content).status().code(), kInvalid);
}

TEST(TableReader, RefusesSimulatedAndSyntheticProvenance) {
  for (const char* source : {"simulated", "synthetic", "synthetic-paper-figure", "guessed"}) {
    LooseTable table;
    table.document["provenance"]["source"] = source;
    ExpectRefused(table, kUnfit, source);
  }
}

TEST(TableReader, RefusesAbsentProvenance) {
  LooseTable table;
  table.document["provenance"].erase("source");
  ExpectRefused(table, kInvalid, "source=(missing)");
  table.document.erase("provenance");
  ExpectRefused(table, kInvalid, "provenance=(missing)");
}

TEST(TableReader, RefusesEachMissingTensor) {
  for (const char* name : {"head_weights", "gate_thresholds", "entropy_edges", "ppl_edges"}) {
    LooseTable table;
    table.left_out = name;
    ExpectRefused(table, kInvalid, name);
  }
}

TEST(TableReader, RefusesAnotherLayerCountThanTheModel) {
  LooseTable table;
  table.document["model"]["num_layers"] = 3;
  ExpectRefused(table, kInvalid, "shape=[2, 4], want [3, 4]");
}

TEST(TableReader, RefusesAnotherHeadCountThanTheModel) {
  LooseTable table;
  table.document["model"]["num_qo_heads"] = 8;
  ExpectRefused(table, kInvalid, "shape=[2, 4], want [2, 8]");
}

TEST(TableReader, RefusesHeadsThatAreNoMultipleOfKvHeads) {
  LooseTable table;
  table.document["model"]["num_kv_heads"] = 3;
  ExpectRefused(table, kInvalid, "num_qo_heads=4");
}

TEST(TableReader, RefusesHeadWeightsOffTheirRange) {
  for (const float value : {0.79f, 1.51f}) {
    LooseTable table;
    table.head_weights[5] = value;
    ExpectRefused(table, kInvalid, "head_weights: element[5]=");
  }
}

TEST(TableReader, RefusesGatesOffTheirRange) {
  for (const float value : {0.79f, 1.01f}) {
    LooseTable table;
    table.gate_thresholds[3] = value;
    ExpectRefused(table, kInvalid, "gate_thresholds: element[3]=");
  }
}

TEST(TableReader, RangeBoundsThemselvesAreValid) {
  LooseTable table;
  table.head_weights[0] = 0.8f;
  table.head_weights[1] = 1.5f;
  table.gate_thresholds[0] = 0.8f;
  table.gate_thresholds[1] = 1.0f;
  EXPECT_TRUE(table.Parse().ok());
}

TEST(TableReader, ADeclaredGridReplacesTheRanges) {
  LooseTable table;
  table.gate_thresholds[0] = 0.25f;
  table.document["grid"] = {{"gate", {0.2, 1.0}}};
  EXPECT_TRUE(table.Parse().ok()) << table.Parse().status();
  table.head_weights[0] = 1.75f;
  ExpectRefused(table, kInvalid, "head_weights");
}

TEST(TableReader, RefusesGridsThatAreNoRanges) {
  for (const char* grid : {"[1.5, 0.8]", "[0.8]", "\"x\"", "[0, 1]", "[0.8, null]"}) {
    LooseTable table;
    table.document["grid"]["head"] = nlohmann::json::parse(grid);
    ExpectRefused(table, kInvalid, "grid.head");
  }
}

TEST(TableReader, RefusesNaNAndInfinity) {
  LooseTable table;
  table.gate_thresholds[7] = std::nanf("");
  ExpectRefused(table, kInvalid, "gate_thresholds: element[7]");
  LooseTable infinite;
  infinite.entropy_edges[0] = std::numeric_limits<float>::infinity();
  ExpectRefused(infinite, kInvalid, "entropy_edges: element[0]");
}

TEST(TableReader, RefusesDecreasingEdges) {
  LooseTable table;
  table.ppl_edges = {10.0f, 9.0f};
  table.gate_thresholds.assign(8, 0.9f);
  ExpectRefused(table, kInvalid, "ppl_edges: element[1]=9, want at least 10");
}

TEST(TableReader, AcceptsEqualEdges) {
  CompilerKvTableContent content = SmallTable();
  content.entropy_edges = {4.0f, 4.0f};
  content.gate_thresholds.assign(2 * 2 * 3 * 2, 0.9f);
  EXPECT_TRUE(SerializeTable(content).ok());
}

TEST(TableReader, RefusesBudgetsThatRepeatOrAreNotPositive) {
  for (const std::vector<int64_t>& budgets :
       {std::vector<int64_t>{128, 128}, {0, 128}, {-1, 128}}) {
    LooseTable table;
    table.budgets = budgets;
    table.head_weights.assign(16, 1.0f);
    table.gate_thresholds.assign(16, 0.9f);
    ExpectRefused(table, kInvalid, "budgets: element[");
  }
}

TEST(TableReader, RefusesADefaultBudgetThatIsNotCompiled) {
  LooseTable table;
  table.budgets = {128, 256};
  table.head_weights.assign(16, 1.0f);
  table.gate_thresholds.assign(16, 0.9f);
  table.document["default_budget"] = 512;
  ExpectRefused(table, kInvalid, "default_budget=512, want one of budgets 128, 256");
}

TEST(TableReader, RefusesDuplicateKeysInTheDocument) {
  LooseTable table;
  const std::string text = table.document.dump();
  const std::string twice = "{\"name\":\"other\"," + text.substr(1);
  const auto bytes = SerializeSafetensors({{"keepset", twice}}, {});
  const auto parsed = ParseTable(AsBytes(*bytes), "t");
  EXPECT_EQ(parsed.status().code(), kInvalid);
  EXPECT_THAT(std::string(parsed.status().message()), HasSubstr("duplicate key \"name\""));
}

TEST(TableReader, RefusesAFileWithoutOurDocument) {
  const auto bytes = SerializeSafetensors({{"format", "pt"}}, {});
  EXPECT_THAT(std::string(ParseTable(AsBytes(*bytes), "t").status().message()),
              HasSubstr("__metadata__.keepset=(missing)"));
}

TEST(TableReader, RefusesEveryTruncation) {
  const std::string whole = LooseTable().Bytes();
  for (std::size_t size = 0; size < whole.size(); ++size) {
    const auto parsed = ParseTable(AsBytes(whole.substr(0, size)), "cut");
    ASSERT_EQ(parsed.status().code(), kInvalid) << size;
  }
}

TEST(TableReader, RefusesAFileThatIsNotSafetensors) {
  EXPECT_EQ(ParseTable(AsBytes("\x80\x04pickled nonsense, quite long"), "t").status().code(),
            kInvalid);
}

TEST(TableReader, ListsWhatItIgnores) {
  LooseTable table;
  table.document["future"] = 1;
  const auto file = SafetensorsFile::Parse(AsBytes(table.Bytes()), "t");
  std::vector<TensorToWrite> tensors = {{"extra", TensorDType::kF8E4M3, {1}, AsBytes("x")}};
  for (const TensorInfo& t : (*file)->tensors()) {
    tensors.push_back({t.name, t.dtype, t.shape, t.bytes});
  }
  const auto bytes =
      SerializeSafetensors({{"keepset", table.document.dump()}, {"other", "x"}}, tensors);
  const auto parsed = ParseTable(AsBytes(*bytes), "t");
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_THAT((*parsed)->ignored(), ElementsAre("key future", "metadata other", "tensor extra"));
}

TEST(TableReader, ReadsBackAWrittenFileWithItsDigest) {
  TemporaryDirectory directory;
  const auto bytes = SerializeTable(SmallTable());
  ASSERT_TRUE(WriteFileAtomically(directory.Path("t.safetensors"), *bytes).ok());
  const auto table = ReadTable(directory.Path("t.safetensors"));
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_EQ((*table)->identity().digest, (*SafetensorsFile::Parse(AsBytes(*bytes), ""))->Digest());
}

TEST(TableReader, ReportsAMissingFileAsNotFound) {
  TemporaryDirectory directory;
  EXPECT_EQ(ReadTable(directory.Path("none")).status().code(), absl::StatusCode::kNotFound);
}

TEST(TableWriter, RefusesContentTheReaderWouldRefuse) {
  CompilerKvTableContent content = SmallTable();
  content.head_weights[0] = 2.0f;
  EXPECT_EQ(SerializeTable(content).status().code(), kInvalid);
  content = SmallTable();
  content.head_weights.pop_back();
  EXPECT_EQ(SerializeTable(content).status().code(), kInvalid);
  content = SmallTable();
  content.provenance_json = "{}";
  EXPECT_EQ(SerializeTable(content).status().code(), kInvalid);
}

TEST(TableWriter, KeepsADeclaredGrid) {
  CompilerKvTableContent content = SmallTable();
  content.head_weights[0] = 2.0f;
  content.head_grid = {0.8f, 2.0f};
  EXPECT_TRUE(SerializeTable(content).ok()) << SerializeTable(content).status();
}

TEST(UniformTable, IsValidNamedUniformAndServesAnyBudget) {
  const auto table = Parsed(UniformTable(SmallModel(), 1.0f, 0.9f));
  EXPECT_EQ(table->provenance_source(), "uniform");
  const auto slice =
      table->AsCompilerKv()->Slice(7, TableBudgetMatch::kExact, 2, LayerMatch::kExact);
  ASSERT_TRUE(slice.ok());
  EXPECT_EQ(slice->gate(1, 0, 0), 0.9f);
  EXPECT_EQ(slice->head_weight(1, 3), 1.0f);
  EXPECT_THAT(slice->relaxed, IsEmpty());
}

TEST(CompilerKvSlice, PicksTheRowsOfTheExactBudgetInFileOrder) {
  const auto table = Parsed(SmallTable());
  const auto slice =
      table->AsCompilerKv()->Slice(128, TableBudgetMatch::kExact, 2, LayerMatch::kExact);
  ASSERT_TRUE(slice.ok());
  EXPECT_EQ(slice->head_weight(1, 2), 0.8f + 0.1f * 1 + 0.05f * 2 + 0.2f * 1);
  EXPECT_EQ(slice->gate(1, 1, 0), 0.8f + 0.05f * 1 + 0.01f * 2);
  EXPECT_THAT(slice->relaxed, IsEmpty());
}

TEST(CompilerKvSlice, RefusesABudgetThatIsNotCompiledAndListsThoseThatAre) {
  const auto table = Parsed(SmallTable());
  const auto slice =
      table->AsCompilerKv()->Slice(200, TableBudgetMatch::kExact, 2, LayerMatch::kExact);
  EXPECT_EQ(slice.status().code(), kUnfit);
  EXPECT_THAT(std::string(slice.status().message()), HasSubstr("want one of 256, 128"));
}

TEST(CompilerKvSlice, NearestBudgetIsReportedAndTakesTheLowerOnTies) {
  const auto table = Parsed(SmallTable());
  const auto slice =
      table->AsCompilerKv()->Slice(192, TableBudgetMatch::kNearest, 2, LayerMatch::kExact);
  ASSERT_TRUE(slice.ok());
  EXPECT_THAT(slice->relaxed, ElementsAre("table_budget: 192 served by 128"));
  EXPECT_EQ(slice->head_weight(0, 0), 0.8f + 0.1f * 1);
}

TEST(CompilerKvSlice, AnExactBudgetIsNotReportedAsRelaxed) {
  const auto table = Parsed(SmallTable());
  const auto slice =
      table->AsCompilerKv()->Slice(256, TableBudgetMatch::kNearest, 2, LayerMatch::kExact);
  ASSERT_TRUE(slice.ok());
  EXPECT_THAT(slice->relaxed, IsEmpty());
}

TEST(CompilerKvSlice, RefusesBudgetsBelowOne) {
  const auto table = Parsed(SmallTable());
  EXPECT_EQ(table->AsCompilerKv()
                ->Slice(0, TableBudgetMatch::kNearest, 2, LayerMatch::kExact)
                .status()
                .code(),
            kInvalid);
}

TEST(CompilerKvSlice, OtherLayerCountsNeedTheRelaxation) {
  const auto table = Parsed(SmallTable());
  EXPECT_EQ(table->AsCompilerKv()
                ->Slice(128, TableBudgetMatch::kExact, 3, LayerMatch::kExact)
                .status()
                .code(),
            kUnfit);
  const auto slice =
      table->AsCompilerKv()->Slice(128, TableBudgetMatch::kExact, 3, LayerMatch::kInterpolateDepth);
  ASSERT_TRUE(slice.ok());
  EXPECT_THAT(slice->relaxed, ElementsAre("layer_match: 3 layers from 2"));
  EXPECT_EQ(slice->head_weights.size(), 3 * 4);
  EXPECT_EQ(slice->gate_thresholds.size(), 3 * 4);
  EXPECT_FLOAT_EQ(slice->head_weight(1, 0), 1.0f);
}

TEST(CompilerKvSlice, RefusesLayerCountsNoModelHas) {
  const auto table = Parsed(SmallTable());
  for (const int64_t layers : {int64_t{0}, kMaxModelLayers + 1, INT64_MAX}) {
    EXPECT_EQ(table->AsCompilerKv()
                  ->Slice(128, TableBudgetMatch::kExact, layers, LayerMatch::kInterpolateDepth)
                  .status()
                  .code(),
              kInvalid);
  }
}

TEST(DefaultBudget, StatedThenOnlyThenRefused) {
  CompilerKvTableContent content = SmallTable();
  EXPECT_EQ(Parsed(content)->AsCompilerKv()->DefaultBudget().status().code(), kInvalid);
  content.default_budget = 256;
  EXPECT_EQ(*Parsed(content)->AsCompilerKv()->DefaultBudget(), 256);
  content.default_budget.reset();
  content.budgets = {64};
  content.head_weights.resize(8);
  content.gate_thresholds.resize(8);
  EXPECT_EQ(*Parsed(content)->AsCompilerKv()->DefaultBudget(), 64);
}

TEST(BinOf, AValueEqualToAnEdgeGoesToTheUpperBin) {
  const std::vector<float> edges = {1.0f, 2.0f};
  EXPECT_EQ(BinOf(edges, 0.5), 0);
  EXPECT_EQ(BinOf(edges, 1.0), 1);
  EXPECT_EQ(BinOf(edges, 2.0), 2);
  EXPECT_EQ(BinOf({}, 3.0), 0);
}

TEST(BinOf, EqualEdgesAreAllCounted) {
  const std::vector<float> edges = {1.0f, 1.0f, 2.0f};
  EXPECT_EQ(BinOf(edges, 1.0), 2);
}

TEST(BinOf, RoundsToF32First) {
  // 0.1 in double lies below 0.1f; rounded to F32 it is the edge itself.
  const std::vector<float> edges = {0.1f};
  ASSERT_LT(0.1, static_cast<double>(0.1f));
  EXPECT_EQ(BinOf(edges, 0.1), 1);
}

TEST(InterpolateDepth, TwoRowsToThreeGiveTheGoldenValues) {
  const std::vector<float> rows = {0.8f, 1.5f};
  EXPECT_THAT(InterpolateDepth(rows, 2, 1, 3), ElementsAre(0.8f, 1.15f, 1.5f));
}

TEST(InterpolateDepth, RepeatsASingleRow) {
  const std::vector<float> row = {0.8f, 0.9f};
  EXPECT_THAT(InterpolateDepth(row, 1, 2, 2), ElementsAre(0.8f, 0.9f, 0.8f, 0.9f));
}

TEST(InterpolateDepth, KeepsEndsAndCoincidingRowsExactly) {
  const std::vector<float> rows = {0.81f, 0.97f, 1.43f};
  const std::vector<float> five = InterpolateDepth(rows, 3, 1, 5);
  EXPECT_EQ(five[0], rows[0]);
  EXPECT_EQ(five[2], rows[1]);
  EXPECT_EQ(five[4], rows[2]);
}

TEST(InterpolateDepth, OneOutputRowIsTheFirst) {
  const std::vector<float> rows = {0.8f, 1.5f};
  EXPECT_THAT(InterpolateDepth(rows, 2, 1, 1), ElementsAre(0.8f));
}

TEST(InspectTable, DescribesIdentityTensorsBudgetsAndBins) {
  const auto document = nlohmann::json::parse(InspectTable(*Parsed(SmallTable())));
  EXPECT_EQ(document["name"], "small");
  EXPECT_EQ(document["provenance"]["source"], "hand-written");
  EXPECT_EQ(document["budgets"], nlohmann::json::array({256, 128}));
  EXPECT_EQ(document["entropy_bins"], 2);
  EXPECT_EQ(document["tensors"]["head_weights"]["shape"], nlohmann::json::array({2, 2, 4}));
  EXPECT_EQ(document["model"]["num_layers"], 2);
  EXPECT_EQ(document["ignored"], nlohmann::json::array());
}

TEST(DiffTables, SameContentHasNoLines) {
  EXPECT_THAT(DiffTables(*Parsed(SmallTable()), *Parsed(SmallTable())), IsEmpty());
}

TEST(DiffTables, AKeyEndsNoLineAndReachesNoTerminal) {
  LooseTable a;
  LooseTable b;
  b.document["x\n\u001b[2Jprovenance.source"] = 1;
  b.document["größe"] = 1;
  EXPECT_THAT(
      DiffTables(**a.Parse(), **b.Parse()),
      UnorderedElementsAre("x\\x0a\\x1b[2Jprovenance.source: (none) -> 1", "größe: (none) -> 1"));
}

TEST(DiffTables, NamesEveryDifference) {
  CompilerKvTableContent other = SmallTable();
  other.version = "2";
  other.gate_thresholds[1] = 0.9f;
  EXPECT_THAT(DiffTables(*Parsed(SmallTable()), *Parsed(other)),
              ElementsAre("version: \"1\" -> \"2\"",
                          HasSubstr("gate_thresholds: 1 of 16 elements differ, first [1]")));
}

}  // namespace
}  // namespace keepset::tables
