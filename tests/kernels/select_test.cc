#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/compute_backend.h"
#include "kernels/score_key.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Range = SelectArgs::Range;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

absl::StatusOr<std::vector<Selection>> SelectRows(const std::vector<float>& scores, int64_t rows,
                                                  const std::vector<SelectArgs>& args,
                                                  int num_threads = 2) {
  BackendFixture fixture(num_threads);
  std::unique_ptr<ScoreBuffer> buffer =
      fixture.Buffer(rows, static_cast<int64_t>(scores.size()) / rows, scores);
  return fixture.backend().Select(fixture.context(), *buffer, args);
}

Selection SelectOne(const std::vector<float>& scores, const SelectArgs& args) {
  absl::StatusOr<std::vector<Selection>> selections = SelectRows(scores, 1, {args});
  EXPECT_TRUE(selections.ok()) << selections.status();
  return selections.ok() ? (*selections)[0] : Selection();
}

Selection Oracle(const std::vector<float>& scores, const SelectArgs& args) {
  const int64_t length = static_cast<int64_t>(scores.size());
  std::vector<bool> is_protected(length, false);
  for (const Range& range : args.protected_ranges) {
    std::fill(is_protected.begin() + range.begin, is_protected.begin() + range.end, true);
  }
  Selection selection;
  std::vector<int32_t> order;
  for (int64_t t = 0; t < length; ++t) {
    selection.candidates += scores[t] >= args.threshold;
    if (is_protected[t]) {
      selection.keep_indices.push_back(static_cast<int32_t>(t));
    } else {
      order.push_back(static_cast<int32_t>(t));
    }
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  for (int32_t t : order) {
    const int64_t kept = static_cast<int64_t>(selection.keep_indices.size());
    const bool is_candidate = scores[t] >= args.threshold;
    if (kept >= args.budget || (!is_candidate && kept >= std::min(args.min_kept, args.budget))) {
      break;
    }
    selection.filled += !is_candidate;
    selection.keep_indices.push_back(t);
  }
  std::sort(selection.keep_indices.begin(), selection.keep_indices.end());
  return selection;
}

void ExpectSame(const Selection& actual, const Selection& expected) {
  EXPECT_EQ(actual.keep_indices, expected.keep_indices);
  EXPECT_EQ(actual.candidates, expected.candidates);
  EXPECT_EQ(actual.filled, expected.filled);
}

TEST(Select, MatchesSortingOracleOnRandomScores) {
  std::mt19937 rng(3);
  for (int64_t length : {1, 2, 17, 1000, 5000}) {
    const std::vector<float> scores = RandomValues(rng, length, DType::kF32);
    for (int64_t budget : {int64_t{0}, int64_t{1}, length / 3, length - 1, length, length + 5}) {
      for (float threshold : {-kInfinity, -0.5f, 0.0f, 1.0f, 9.0f}) {
        for (int64_t min_kept : {0, 1, 7}) {
          SelectArgs args;
          args.budget = budget;
          args.threshold = threshold;
          args.min_kept = min_kept;
          ExpectSame(SelectOne(scores, args), Oracle(scores, args));
        }
      }
    }
  }
}

TEST(Select, MatchesSortingOracleWithManyTies) {
  std::mt19937 rng(4);
  std::uniform_int_distribution<int> value(-3, 3);
  for (int round = 0; round < 50; ++round) {
    std::vector<float> scores(300);
    for (float& score : scores) score = static_cast<float>(value(rng)) * 0.25f;
    const std::vector<Range> ranges = {{0, 4}, {50, 50}, {100, 117}, {290, 300}};
    SelectArgs args;
    args.protected_ranges = ranges;
    args.budget = 40 + 5 * round;
    args.threshold = 0.25f;
    args.min_kept = 3 * round;
    ExpectSame(SelectOne(scores, args), Oracle(scores, args));
  }
}

TEST(Select, MatchesSortingOracleOnNeighbouringFloats) {
  std::vector<float> scores(2000);
  float value = 0.99999f;
  for (float& score : scores) score = value = std::nextafter(value, 2.0f);
  std::mt19937 rng(5);
  std::shuffle(scores.begin(), scores.end(), rng);
  SelectArgs args;
  args.budget = 777;
  ExpectSame(SelectOne(scores, args), Oracle(scores, args));
}

TEST(Select, KeepsLowerPositionOnTie) {
  SelectArgs args;
  args.budget = 3;
  EXPECT_THAT(SelectOne({1.0f, 2.0f, 1.0f, 1.0f, 1.0f}, args).keep_indices, ElementsAre(0, 1, 2));
}

TEST(Select, NegativeZeroTiesWithZero) {
  SelectArgs args;
  args.budget = 2;
  args.threshold = 0.0f;
  const Selection selection = SelectOne({-0.0f, 0.0f, 0.0f}, args);
  EXPECT_THAT(selection.keep_indices, ElementsAre(0, 1));
  EXPECT_EQ(selection.candidates, 3);
}

TEST(Select, OrdersInfinities) {
  SelectArgs args;
  args.budget = 3;
  EXPECT_THAT(SelectOne({-kInfinity, 1.0f, kInfinity, -1.0f, kInfinity}, args).keep_indices,
              ElementsAre(1, 2, 4));
}

TEST(Select, EqualScoresKeepTheFirstPositions) {
  SelectArgs args;
  args.budget = 4;
  EXPECT_THAT(SelectOne(std::vector<float>(100, 0.125f), args).keep_indices,
              ElementsAre(0, 1, 2, 3));
}

TEST(Select, BudgetZeroKeepsNothing) {
  SelectArgs args;
  args.budget = 0;
  args.min_kept = 1;
  EXPECT_THAT(SelectOne({1.0f, 2.0f}, args).keep_indices, IsEmpty());
}

TEST(Select, FewerCandidatesThanBudgetAreNotPadded) {
  SelectArgs args;
  args.budget = 4;
  args.threshold = 0.9f;
  const Selection selection = SelectOne({0.5f, 0.95f, 0.1f, 1.4f, 0.2f}, args);
  EXPECT_THAT(selection.keep_indices, ElementsAre(1, 3));
  EXPECT_EQ(selection.filled, 0);
}

TEST(Select, MinKeptFillsFromBelowTheThreshold) {
  SelectArgs args;
  args.budget = 4;
  args.threshold = 0.9f;
  args.min_kept = 3;
  const Selection selection = SelectOne({0.5f, 0.95f, 0.1f, 1.4f, 0.2f}, args);
  EXPECT_THAT(selection.keep_indices, ElementsAre(0, 1, 3));
  EXPECT_EQ(selection.candidates, 2);
  EXPECT_EQ(selection.filled, 1);
}

TEST(Select, ProtectedPositionsComeFirstAndCount) {
  const std::vector<Range> ranges = {{0, 1}, {4, 6}};
  SelectArgs args;
  args.protected_ranges = ranges;
  args.budget = 4;
  const Selection selection = SelectOne({0.0f, 5.0f, 9.0f, 7.0f, 0.0f, 0.0f}, args);
  EXPECT_THAT(selection.keep_indices, ElementsAre(0, 2, 4, 5));
  EXPECT_EQ(selection.filled, 0);
}

TEST(Select, CompilerKvGoldenGateCutsAtBudget) {
  SelectArgs args;
  args.threshold = 0.9f;
  args.budget = 3;
  EXPECT_THAT(SelectOne({0.75f, 2.25f, 1.6875f}, args).keep_indices, ElementsAre(1, 2));
  args.budget = 1;
  EXPECT_THAT(SelectOne({0.95f, 1.4f, 1.1f}, args).keep_indices, ElementsAre(1));
}

TEST(Select, RowsUseTheirOwnArguments) {
  std::vector<SelectArgs> args(2);
  args[0].budget = 1;
  args[1].budget = 2;
  absl::StatusOr<std::vector<Selection>> selections = SelectRows({1, 2, 3, 3, 2, 1}, 2, args);
  ASSERT_TRUE(selections.ok());
  EXPECT_THAT((*selections)[0].keep_indices, ElementsAre(2));
  EXPECT_THAT((*selections)[1].keep_indices, ElementsAre(0, 1));
}

TEST(Select, ThreadCountDoesNotShow) {
  std::mt19937 rng(6);
  const std::vector<float> scores = RandomValues(rng, 16 * 700, DType::kBF16);
  SelectArgs args;
  args.budget = 123;
  absl::StatusOr<std::vector<Selection>> one = SelectRows(scores, 16, {args}, 1);
  ASSERT_TRUE(one.ok());
  for (int num_threads : {2, 8}) {
    absl::StatusOr<std::vector<Selection>> many = SelectRows(scores, 16, {args}, num_threads);
    ASSERT_TRUE(many.ok());
    for (size_t row = 0; row < one->size(); ++row) ExpectSame((*many)[row], (*one)[row]);
  }
}

TEST(Select, NanNamesRowAndPosition) {
  SelectArgs args;
  args.budget = 1;
  const absl::Status status =
      SelectRows({1, 2, 3, 4, 5, std::numeric_limits<float>::quiet_NaN()}, 2, {args}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("row 1 position 2 is NaN"));
}

TEST(Select, MoreProtectedThanBudgetIsRefused) {
  const std::vector<Range> ranges = {{0, 3}};
  SelectArgs args;
  args.protected_ranges = ranges;
  args.budget = 2;
  EXPECT_EQ(SelectRows({1, 2, 3, 4}, 1, {args}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(Select, OverlappingOrOutOfRangeProtectedSpansAreRefused) {
  for (const std::vector<Range>& ranges :
       {std::vector<Range>{{0, 2}, {1, 3}}, std::vector<Range>{{2, 3}, {0, 1}},
        std::vector<Range>{{3, 5}}, std::vector<Range>{{-1, 1}}, std::vector<Range>{{2, 1}}}) {
    SelectArgs args;
    args.protected_ranges = ranges;
    args.budget = 4;
    EXPECT_EQ(SelectRows({1, 2, 3, 4}, 1, {args}).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
}

TEST(ScoreKey, OrdersLikeTheFloats) {
  const std::vector<float> ascending = {-kInfinity, -3.0f, -1e-42f, 0.0f, 1e-42f, 0.5f, kInfinity};
  for (size_t i = 1; i < ascending.size(); ++i) {
    EXPECT_LT(ScoreKey(ascending[i - 1]), ScoreKey(ascending[i]));
  }
  EXPECT_EQ(ScoreKey(-0.0f), ScoreKey(0.0f));
}

}  // namespace
}  // namespace keepset::kernels
