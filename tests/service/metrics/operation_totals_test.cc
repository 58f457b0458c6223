#include "service/metrics/operation_totals.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"

namespace keepset::service {
namespace {

using ::testing::ElementsAre;
using ::testing::Pair;
using ::testing::SizeIs;

constexpr auto kScore = static_cast<size_t>(Stage::kScore);
constexpr auto kGather = static_cast<size_t>(Stage::kGather);

OperationSample Sample(const std::string& model, const std::string& policy = "snapkv") {
  OperationSample sample;
  sample.model = model;
  sample.policy = policy;
  sample.outcome = "compressed";
  sample.reason = "none";
  sample.input_tokens = 100;
  sample.kept_tokens = 40;
  sample.bytes_before = 1000;
  sample.bytes_after = 400;
  sample.stages[kScore] = absl::Milliseconds(3);
  return sample;
}

TEST(OperationTotals, AddsUpWhatOperationsOfOneRowDid) {
  OperationTotals totals;
  totals.Record(Sample("llama"), "");
  OperationSample slow = Sample("llama");
  slow.stages[kScore] = absl::Milliseconds(5);
  totals.Record(slow, "");

  const std::vector<OperationTotal> rows = totals.All();
  ASSERT_THAT(rows, SizeIs(1));
  EXPECT_EQ(rows[0].model, "llama");
  EXPECT_EQ(rows[0].policy, "snapkv");
  EXPECT_FALSE(rows[0].table.has_value());
  EXPECT_THAT(rows[0].outcomes, ElementsAre(Pair(Pair("compressed", "none"), 2)));
  EXPECT_EQ(rows[0].input_tokens, 200);
  EXPECT_EQ(rows[0].kept_tokens, 80);
  EXPECT_EQ(rows[0].bytes_before, 2000);
  EXPECT_EQ(rows[0].bytes_after, 800);
  EXPECT_EQ(rows[0].stages[kScore].count, 2);
  EXPECT_EQ(rows[0].stages[kScore].time, absl::Milliseconds(8));
  EXPECT_EQ(rows[0].stages[kScore].longest, absl::Milliseconds(5));
}

TEST(OperationTotals, AStageThatWasNotPassedIsNotCounted) {
  OperationTotals totals;
  totals.Record(Sample("llama"), "");
  EXPECT_EQ(totals.All()[0].stages[kGather].count, 0);
}

TEST(OperationTotals, ModelsPoliciesAndTablesHaveRowsOfTheirOwn) {
  OperationTotals totals;
  const OperationSample::Table first = {"line", "1", "sha256:aa"};
  const OperationSample::Table second = {"line", "2", "sha256:bb"};
  OperationSample gated = Sample("llama", "compilerkv");
  totals.Record(Sample("llama", "tova"), "");
  gated.table = first;
  totals.Record(gated, "");
  gated.table = second;
  totals.Record(gated, "");
  totals.Record(Sample("gemma", "tova"), "");

  const std::vector<OperationTotal> rows = totals.All();
  ASSERT_THAT(rows, SizeIs(4));
  EXPECT_EQ(rows[0].model, "gemma");
  EXPECT_EQ(rows[1].table, first);
  EXPECT_EQ(rows[2].table, second);
  EXPECT_EQ(rows[3].policy, "tova");
}

TEST(OperationTotals, ASessionIsToldItsOwn) {
  OperationTotals totals;
  totals.OpenSession("a");
  totals.OpenSession("b");
  totals.Record(Sample("llama"), "a");
  totals.Record(Sample("gemma"), "");

  ASSERT_TRUE(totals.OfSession("a").ok());
  EXPECT_THAT(*totals.OfSession("a"), SizeIs(1));
  EXPECT_THAT(*totals.OfSession("b"), SizeIs(0));
  EXPECT_THAT(totals.All(), SizeIs(2));
}

TEST(OperationTotals, AnEndedSessionLeavesNothingBehind) {
  OperationTotals totals;
  totals.OpenSession("a");
  totals.ForgetSession("a");
  totals.Record(Sample("llama"), "a");

  EXPECT_EQ(totals.OfSession("a").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(totals.All(), SizeIs(1));
}

TEST(OperationTotals, NamesThatRequestsMakeUpDoNotGrowIt) {
  OperationTotals totals;
  totals.OpenSession("a");
  for (int i = 0; i < 1000; ++i) {
    totals.Record(Sample(absl::StrCat(i, std::string(10000, 'x'))), "a");
  }
  const std::vector<OperationTotal> rows = totals.All();
  ASSERT_THAT(rows, SizeIs(OperationTotals::kMaxRows));
  EXPECT_THAT(*totals.OfSession("a"), SizeIs(OperationTotals::kMaxRowsPerSession));
  int64_t operations = 0;
  for (const OperationTotal& row : rows) {
    EXPECT_LE(row.model.size(), 128u);
    operations += row.outcomes.begin()->second;
  }
  EXPECT_EQ(operations, 1000);
  EXPECT_EQ(rows.back().model, "other");
  EXPECT_EQ(rows.back().policy, "other");
}

TEST(OperationTotals, CutsNoCharacterOfAModelsName) {
  OperationTotals totals;
  totals.Record(Sample(std::string(127, 'a') + "é"), "");
  EXPECT_EQ(totals.All()[0].model, std::string(127, 'a'));
}

TEST(OperationTotals, ThreadsCountTogether) {
  OperationTotals totals;
  totals.OpenSession("a");
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&totals] {
      for (int i = 0; i < 100; ++i) totals.Record(Sample("llama"), "a");
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(totals.All()[0].input_tokens, 400 * 100);
  EXPECT_EQ((*totals.OfSession("a"))[0].input_tokens, 400 * 100);
}

}  // namespace
}  // namespace keepset::service
