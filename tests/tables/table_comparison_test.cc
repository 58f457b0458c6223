#include <cmath>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tables/rank_correlation.h"
#include "tables/table_file.h"
#include "tests/tables/table_samples.h"

namespace keepset::tables {
namespace {

using Json = nlohmann::json;

std::shared_ptr<const DecisionTable> Parsed(const CompilerKvTableContent& content) {
  return ParseTable(AsBytes(SerializeTable(content).value()), "sample").value();
}

Json Compare(const CompilerKvTableContent& a, const CompilerKvTableContent& b) {
  return Json::parse(CompareTables(*Parsed(a), *Parsed(b)));
}

// Ranks by counting, correlation by definition.
double SpearmanOracle(const std::vector<float>& a, const std::vector<float>& b) {
  const auto ranks = [](const std::vector<float>& values) {
    std::vector<double> out;
    for (const float x : values) {
      double below = 0;
      for (const float y : values) below += y < x ? 1 : y == x ? 0.5 : 0;
      out.push_back(below);
    }
    return out;
  };
  const std::vector<double> x = ranks(a);
  const std::vector<double> y = ranks(b);
  const auto n = static_cast<double>(a.size());
  double sx = 0, sy = 0, sxx = 0, syy = 0, sxy = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    sx += x[i];
    sy += y[i];
    sxx += x[i] * x[i];
    syy += y[i] * y[i];
    sxy += x[i] * y[i];
  }
  return (n * sxy - sx * sy) / std::sqrt((n * sxx - sx * sx) * (n * syy - sy * sy));
}

TEST(SpearmanCorrelation, AgreesWithAPlainOracleWithTies) {
  std::mt19937_64 random(7);
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<float> a(40);
    std::vector<float> b(40);
    for (float& x : a) x = static_cast<float>(random() % 9);
    for (float& x : b) x = static_cast<float>(random() % 30);
    EXPECT_NEAR(*SpearmanCorrelation(a, b), SpearmanOracle(a, b), 1e-12);
  }
}

TEST(RankCorrelation, OrderAndItsReverseAreTheEnds) {
  const std::vector<float> up = {1, 2, 5, 9};
  const std::vector<float> down = {4, 3, 2, 0};
  EXPECT_DOUBLE_EQ(*SpearmanCorrelation(up, up), 1);
  EXPECT_DOUBLE_EQ(*SpearmanCorrelation(up, down), -1);
  EXPECT_DOUBLE_EQ(*KendallTau(up, up), 1);
  EXPECT_DOUBLE_EQ(*KendallTau(up, down), -1);
}

TEST(KendallTau, CorrectsForTies) {
  // Pairs: 5 agree, one tied in b alone: 5 / sqrt(6 * 5).
  const std::vector<float> a = {1, 2, 3, 4};
  const std::vector<float> b = {1, 2, 2, 4};
  EXPECT_NEAR(*KendallTau(a, b), 5 / std::sqrt(30.0), 1e-12);
}

TEST(RankCorrelation, IsUndefinedWhereNothingIsRanked) {
  const std::vector<float> flat = {1, 1, 1};
  const std::vector<float> ranked = {1, 2, 3};
  EXPECT_FALSE(SpearmanCorrelation(flat, ranked).has_value());
  EXPECT_FALSE(KendallTau(ranked, flat).has_value());
  EXPECT_FALSE(SpearmanCorrelation({}, {}).has_value());
}

TEST(CompareTables, EqualTablesRankAlikeAndChangeNothing) {
  const Json found = Compare(SmallTable(), SmallTable());
  EXPECT_DOUBLE_EQ(found["head_rankings"]["mean_spearman"], 1);
  EXPECT_EQ(found["head_weights"]["changed"], 0);
  EXPECT_EQ(found["gate_thresholds"]["compared"], 16);
}

TEST(CompareTables, BudgetsAreMatchedByValueNotByPlace) {
  CompilerKvTableContent other = SmallTable();
  std::swap(other.budgets[0], other.budgets[1]);
  std::rotate(other.head_weights.begin(), other.head_weights.begin() + 8, other.head_weights.end());
  std::rotate(other.gate_thresholds.begin(), other.gate_thresholds.begin() + 8,
              other.gate_thresholds.end());
  EXPECT_EQ(Compare(SmallTable(), other)["head_weights"]["changed"], 0);
}

TEST(CompareTables, LargestChangesComeFirst) {
  CompilerKvTableContent other = SmallTable();
  other.head_weights[1] += 0.1f;
  other.head_weights[15] -= 0.3f;
  const Json cells = Compare(SmallTable(), other)["head_weights"]["cells"];
  ASSERT_EQ(cells.size(), 2);
  EXPECT_EQ(cells[0]["budget"], 128);
  EXPECT_EQ(cells[0]["layer"], 1);
  EXPECT_EQ(cells[0]["head"], 3);
  EXPECT_EQ(cells[1]["head"], 1);
}

TEST(CompareTables, GatesOfOtherBinsAreNotCompared) {
  CompilerKvTableContent other = SmallTable();
  other.entropy_edges[0] += 1;
  const Json found = Compare(SmallTable(), other);
  EXPECT_TRUE(found["gate_thresholds"].is_null());
  EXPECT_TRUE(found["head_weights"].is_object());
}

TEST(CompareTables, TablesWithoutASharedBudgetAreNotCompared) {
  CompilerKvTableContent other = SmallTable();
  other.budgets = {64, 32};
  const Json found = Compare(SmallTable(), other);
  EXPECT_EQ(found["shared_budgets"], Json::array());
  EXPECT_TRUE(found["head_rankings"].is_null());
}

}  // namespace
}  // namespace keepset::tables
