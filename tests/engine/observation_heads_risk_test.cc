// The risk gate of observation_heads.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/engine/observation_heads_test_support.h"

namespace keepset::engine {
namespace {

using tables::ObservedRows;
using testing::kBudget;
using testing::ObservationHeadsTest;
using testing::ObservationScores;
using testing::Scores;

class RiskGateTest : public ObservationHeadsTest {
 protected:
  RiskGateTest() {
    settings_.risk_curve = {{0.0, 0.0}, {1.0, 1.0}};
    observations_ = {{1, 2, ObservedRows::kMeanRows, 1.0f}};
  }

  // Share of the score outside `count` positions, the two protected ones first.
  double Outside(int64_t count) const {
    Scores scores = ObservationScores(prompt_, observations_, {});
    scores.erase(scores.begin(), scores.begin() + 2);
    std::sort(scores.rbegin(), scores.rend());
    const double inside = std::accumulate(scores.begin(), scores.begin() + count - 2, 0.0);
    return 1.0 - inside / std::accumulate(scores.begin(), scores.end(), 0.0);
  }
};

TEST_F(RiskGateTest, ThePredictedMissRateIsReadOffTheCurve) {
  const auto result = Run(Spec());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_NEAR(*result->outside_mass, Outside(kBudget), 1e-5);
  EXPECT_NEAR(*result->predicted_miss_rate, Outside(kBudget), 1e-5);
  EXPECT_EQ(result->layers[0].keep_indices[0].size(), static_cast<size_t>(kBudget));
}

TEST_F(RiskGateTest, WithoutACurveNothingIsPredicted) {
  settings_.risk_curve.clear();
  const auto result = Run(Spec());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_FALSE(result->predicted_miss_rate.has_value());
}

TEST_F(RiskGateTest, KeepsFewerWhenTheTargetAllows) {
  OperationSpec spec = Spec();
  spec.parameters["risk_target"] = absl::StrCat(Outside(12) + 1e-4);
  const auto result = Run(spec);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->layers[0].keep_indices[0].size(), 12u);
  EXPECT_LE(*result->predicted_miss_rate, Outside(12) + 1e-4);
}

TEST_F(RiskGateTest, NeverMoreThanTheBudgetUnlessAskedTo) {
  OperationSpec spec = Spec();
  spec.parameters["risk_target"] = absl::StrCat(Outside(40) + 1e-4);
  EXPECT_EQ(Run(spec)->layers[0].keep_indices[0].size(), static_cast<size_t>(kBudget));
  spec.parameters["risk_max_tokens"] = "60";
  EXPECT_EQ(Run(spec)->layers[0].keep_indices[0].size(), 40u);
}

TEST_F(RiskGateTest, ATargetOutOfReachIsReportedAsItIs) {
  OperationSpec spec = Spec();
  spec.parameters["risk_target"] = "0";
  const auto result = Run(spec);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_GT(*result->predicted_miss_rate, 0.0);
}

TEST_F(RiskGateTest, ATargetNeedsACurve) {
  settings_.risk_curve.clear();
  OperationSpec spec = Spec();
  spec.parameters["risk_target"] = "0.1";
  ExpectRefused(spec, absl::StatusCode::kFailedPrecondition, "has no risk curve");
}

TEST_F(RiskGateTest, ARequestThatDilatesOnceMoreIsToldNoRisk) {
  OperationSpec spec = Spec();
  spec.parameters["dilate"] = "3";
  const auto result = Run(spec);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_FALSE(result->predicted_miss_rate.has_value());
  EXPECT_FALSE(result->outside_mass.has_value());
  spec.parameters["risk_target"] = "0.1";
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument, "want dilate=0, not 3");
}

TEST_F(RiskGateTest, GroupsOfLayersMergedIntoOneSetAreToldNoRisk) {
  settings_.layer_groups = {{0, 2}, {2, 3}};
  observations_ = {{1, 2, ObservedRows::kMeanRows, 1.0f}, {2, 1, ObservedRows::kMeanRows, 1.0f}};
  OperationSpec spec = Spec();
  EXPECT_TRUE(Run(spec)->predicted_miss_rate.has_value());
  spec.scope = Scope::kSequence;
  const auto result = Run(spec);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_FALSE(result->predicted_miss_rate.has_value());
  spec.parameters["risk_target"] = "0.1";
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument, "want scope layer_equal, not sequence");
}

TEST_F(RiskGateTest, MostTokensHoldTheProtectedPositions) {
  OperationSpec spec = Spec();
  spec.parameters["risk_target"] = "0.1";
  spec.parameters["risk_max_tokens"] = "1";
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument,
                "risk_max_tokens=1, want at least the 2 protected positions");
}

TEST_F(RiskGateTest, ATargetOutOfRangeIsRefused) {
  for (const char* text : {"-0.1", "1.5", "nan", "much"}) {
    OperationSpec spec = Spec();
    spec.parameters["risk_target"] = text;
    ExpectRefused(spec, absl::StatusCode::kInvalidArgument, "want a number in 0..1");
  }
}

TEST_F(RiskGateTest, MostTokensNeedATarget) {
  OperationSpec spec = Spec();
  spec.parameters["risk_max_tokens"] = "60";
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument, "want risk_target beside it");
}

}  // namespace
}  // namespace keepset::engine
