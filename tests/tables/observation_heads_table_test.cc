#include "tables/observation_heads_table.h"

#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tables/table_file.h"
#include "tables/table_store.h"
#include "tests/tables/table_samples.h"

namespace keepset::tables {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// The content of tests/golden/observation_heads.safetensors. Model: 2 layers, 4 query heads, 2 KV
// heads.
ObservationHeadsContent GoldenHeads() {
  ObservationHeadsContent content;
  content.name = "golden-heads";
  content.version = "1";
  content.model = SmallModel();
  content.observations = {{0, 3, ObservedRows::kLastRow, 0.5f},
                          {1, 0, ObservedRows::kMaxRows, 1.0f},
                          {1, 1, ObservedRows::kKeyNovelty, 0.25f},
                          {1, 0, ObservedRows::kProbeMean, 0.125f}};
  content.settings.pool_kernel = 5;
  content.settings.dilate = 12;
  content.settings.probe = ObservationProbe{"recall", "What was said?"};
  content.settings.layer_groups = {{0, 1}, {1, 2}};
  content.settings.risk_curve = {{0.0, 0.0}, {0.5, 0.25}};
  content.budgets = {96, 192};
  content.default_budget = 96;
  content.provenance_json = R"({"source":"hand-written"})";
  return content;
}

std::shared_ptr<const DecisionTable> Parsed(const ObservationHeadsContent& content) {
  const auto bytes = SerializeTable(content);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  return *ParseTable(AsBytes(*bytes), "sample");
}

// Whatever SerializeTable refuses, the reader refused: it parses what it wrote.
void ExpectRefused(const ObservationHeadsContent& content, absl::string_view message) {
  const auto bytes = SerializeTable(content);
  EXPECT_EQ(bytes.status().code(), absl::StatusCode::kInvalidArgument) << message;
  EXPECT_THAT(std::string(bytes.status().message()), HasSubstr(std::string(message)));
}

std::string GoldenPath() {
  return absl::StrCat(KEEPSET_SOURCE_DIR, "/tests/golden/observation_heads.safetensors");
}

TEST(GoldenObservationHeads, IsWrittenByteForByte) {
  const auto golden = ReadTable(GoldenPath());
  ASSERT_TRUE(golden.ok()) << golden.status();
  EXPECT_EQ(Parsed(GoldenHeads())->identity(), (*golden)->identity());
}

TEST(ObservationHeadsTable, WhatWasWrittenIsRead) {
  const ObservationHeadsContent want = GoldenHeads();
  const auto table = Parsed(want);
  EXPECT_EQ(table->kind(), "observation_heads");
  EXPECT_EQ(table->AsCompilerKv(), nullptr);
  const ObservationHeadsTable* heads = table->AsObservationHeads();
  ASSERT_NE(heads, nullptr);
  EXPECT_THAT(heads->observations(), testing::ElementsAreArray(want.observations));
  EXPECT_EQ(heads->settings(), want.settings);
  EXPECT_THAT(heads->budgets(), ElementsAre(96, 192));
  EXPECT_EQ(*heads->DefaultBudget(), 96);
  EXPECT_THAT(heads->ignored(), IsEmpty());
}

TEST(ObservationHeadsTable, APublicLibrarysFileIsRead) {
  const auto table = ReadTable(absl::StrCat(
      KEEPSET_SOURCE_DIR, "/tests/golden/public_library_observation_heads.safetensors"));
  ASSERT_TRUE(table.ok()) << table.status();
  const ObservationHeadsTable& heads = *(*table)->AsObservationHeads();
  EXPECT_THAT(heads.observations(),
              ElementsAre(HeadObservation{1, 2, ObservedRows::kMeanRows, 2.0f},
                          HeadObservation{0, 1, ObservedRows::kKeyNovelty, 0.5f}));
  EXPECT_EQ(heads.settings(), ObservationSettings{});
}

TEST(ObservationHeadsTable, WithoutBudgetsAskTheRequest) {
  ObservationHeadsContent content = GoldenHeads();
  content.budgets.clear();
  content.default_budget.reset();
  EXPECT_EQ(Parsed(content)->DefaultBudget().status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ObservationHeadsTable, ALayerOutOfRangeIsRefused) {
  ObservationHeadsContent content = GoldenHeads();
  content.observations[1].layer = 2;
  ExpectRefused(content, "tensor heads: element[2]=2, want a layer in 0..1");
}

TEST(ObservationHeadsTable, AQueryHeadOutOfRangeIsRefused) {
  ObservationHeadsContent content = GoldenHeads();
  content.observations[0].head = 4;
  ExpectRefused(content, "element[1]=4, want a query head in 0..3");
}

TEST(ObservationHeadsTable, ANegativeHeadIsRefused) {
  ObservationHeadsContent content = GoldenHeads();
  content.observations[0].head = -1;
  ExpectRefused(content, "element[1]=-1, want a query head in 0..3");
}

TEST(ObservationHeadsTable, KeyNoveltyCountsKvHeads) {
  ObservationHeadsContent content = GoldenHeads();
  content.observations[2].head = 2;
  ExpectRefused(content, "element[5]=2, want a KV head in 0..1");
}

TEST(ObservationHeadsTable, TheSameObservationTwiceIsRefused) {
  ObservationHeadsContent content = GoldenHeads();
  content.observations[0] = content.observations[1];
  ExpectRefused(content, "layer 1 head 0 max_rows is listed twice");
}

TEST(ObservationHeadsTable, OneHeadMayObserveInTwoWays) {
  ObservationHeadsContent content = GoldenHeads();
  content.observations[0] = {1, 0, ObservedRows::kLastRow, 1.0f};
  content.settings.layer_groups.clear();
  EXPECT_TRUE(SerializeTable(content).ok());
}

TEST(ObservationHeadsTable, ANegativeWeightIsRefused) {
  ObservationHeadsContent content = GoldenHeads();
  content.observations[3].weight = -0.5f;
  ExpectRefused(content, "tensor weights: element[3]=-0.5, want at least 0");
}

TEST(ObservationHeadsTable, AllZeroWeightsAreRefused) {
  ObservationHeadsContent content = GoldenHeads();
  for (HeadObservation& one : content.observations) one.weight = 0.0f;
  ExpectRefused(content, "want at least one above 0");
}

TEST(ObservationHeadsTable, AnInfiniteWeightIsRefused) {
  ObservationHeadsContent content = GoldenHeads();
  content.observations[0].weight = std::numeric_limits<float>::infinity();
  ExpectRefused(content, "tensor weights");
}

TEST(ObservationHeadsTable, NoObservationIsRefused) {
  ObservationHeadsContent content = GoldenHeads();
  content.observations.clear();
  ExpectRefused(content, "want at least one observation");
}

TEST(ObservationHeadsTable, UnknownRowsAreRefused) {
  ObservationHeadsContent content = GoldenHeads();
  content.observations[0].rows = static_cast<ObservedRows>(6);
  ExpectRefused(content, "tensor rows: element[0]=6, want 0..5 (last_row, max_rows");
}

TEST(ObservationHeadsTable, ProbeRowsNeedAProbe) {
  ObservationHeadsContent content = GoldenHeads();
  content.settings.probe.reset();
  ExpectRefused(content, "observation_heads.probe=(missing)");
}

TEST(ObservationHeadsTable, AnEvenPoolKernelIsRefused) {
  ObservationHeadsContent content = GoldenHeads();
  content.settings.pool_kernel = 4;
  ExpectRefused(content, "pool_kernel=4, want an odd number");
}

TEST(ObservationHeadsTable, ADilationOutOfRangeIsRefused) {
  ObservationHeadsContent content = GoldenHeads();
  content.settings.dilate = -1;
  ExpectRefused(content, "dilate=-1");
}

TEST(ObservationHeadsTable, LayerGroupsCoverTheModel) {
  ObservationHeadsContent content = GoldenHeads();
  content.settings.layer_groups = {{0, 1}};
  ExpectRefused(content, "groups up to layer 2");
  content.settings.layer_groups = {{1, 2}};
  ExpectRefused(content, "groups cover every layer once");
  content.settings.layer_groups = {{0, 3}};
  ExpectRefused(content, "groups cover every layer once");
}

TEST(ObservationHeadsTable, ALayerGroupNobodyObservesIsRefused) {
  ObservationHeadsContent content = GoldenHeads();
  content.observations[0].weight = 0.0f;
  ExpectRefused(content, "[0, 1), want at least one observation");
}

TEST(ObservationHeadsTable, ARiskCurveAscends) {
  ObservationHeadsContent content = GoldenHeads();
  content.settings.risk_curve = {{0.5, 0.25}, {0.4, 0.5}};
  ExpectRefused(content, "mass ascending");
  content.settings.risk_curve = {{0.2, 0.5}, {0.4, 0.25}};
  ExpectRefused(content, "never falling");
  content.settings.risk_curve = {{0.2, 1.5}};
  ExpectRefused(content, "within 0..1");
}

TEST(InspectTable, ListsEveryObservation) {
  const auto json = nlohmann::json::parse(InspectTable(*Parsed(GoldenHeads())));
  EXPECT_EQ(json["kind"], "observation_heads");
  ASSERT_EQ(json["observations"].size(), 4u);
  EXPECT_EQ(json["observations"][2]["rows"], "key_novelty");
  EXPECT_EQ(json["observation_heads"]["probe"]["name"], "recall");
}

TEST(DiffTables, ObservationsAreComparedWhateverTheirOrder) {
  ObservationHeadsContent other = GoldenHeads();
  std::swap(other.observations[0], other.observations[3]);
  EXPECT_THAT(DiffTables(*Parsed(GoldenHeads()), *Parsed(other)), IsEmpty());
  other.observations[1].weight = 2.0f;
  EXPECT_THAT(DiffTables(*Parsed(GoldenHeads()), *Parsed(other)),
              ElementsAre("weight of layer 1 head 0 max_rows: 1 -> 2"));
}

TEST(DiffTables, SettingsAreComparedByName) {
  ObservationHeadsContent other = GoldenHeads();
  other.settings.dilate = 0;
  other.settings.layer_groups = {{0, 2}};
  other.settings.risk_curve[1].miss_rate = 0.5;
  EXPECT_THAT(DiffTables(*Parsed(GoldenHeads()), *Parsed(other)),
              ElementsAre("observation_heads.dilate: 12 -> 0",
                          "observation_heads.layer_groups: [[0,1],[1,2]] -> [[0,2]]",
                          "observation_heads.risk.curve: [[0.0,0.0],[0.5,0.25]] -> "
                          "[[0.0,0.0],[0.5,0.5]]"));
}

TEST(DiffTables, TablesOfTwoKindsDifferInKind) {
  const auto bytes = SerializeTable(SmallTable());
  ASSERT_TRUE(bytes.ok());
  const auto compilerkv = *ParseTable(AsBytes(*bytes), "compilerkv");
  EXPECT_THAT(DiffTables(*compilerkv, *Parsed(GoldenHeads())),
              testing::Contains("kind: compilerkv -> observation_heads"));
}

TEST(ResolveTable, ThePolicysKindPicksTheTable) {
  const auto bytes = SerializeTable(SmallTable());
  ASSERT_TRUE(bytes.ok());
  TableSnapshot snapshot;
  snapshot.tables = {*ParseTable(AsBytes(*bytes), "compilerkv"), Parsed(GoldenHeads())};
  TableQuery query;
  query.kind = "observation_heads";
  query.model = SmallModel();
  const auto table = ResolveTable(snapshot, query);
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_EQ(table->table->identity().name, "golden-heads");
}

TEST(ResolveTable, AnotherModelsHeadsDoNotFit) {
  TableSnapshot snapshot;
  snapshot.tables = {Parsed(GoldenHeads())};
  TableQuery query;
  query.kind = "observation_heads";
  query.model = SmallModel();
  query.model.num_qo_heads = 8;
  EXPECT_EQ(ResolveTable(snapshot, query).status().code(), absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace keepset::tables
