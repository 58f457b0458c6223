// Columns of chosen heads, novelty of keys, normalisation of rows.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/compute_backend.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {
namespace {

using ::testing::HasSubstr;

// As in window_columns_test.cc: fp32 dot products carry a few 1e-6 into the exponent.
constexpr double kRelative = 5e-5;
constexpr double kAbsolute = 1e-6;

constexpr int64_t kQoHeads = 8;
constexpr int64_t kKvHeads = 2;
constexpr int64_t kRows = 12;
constexpr int64_t kTokens = 1200;
constexpr int64_t kDim = 32;

struct Problem {
  explicit Problem(DType dtype = DType::kF32, Layout layout = Layout::kHnd)
      : rng(5),
        q(RandomValues(rng, kQoHeads * kRows * kDim, dtype), kQoHeads, kRows, kDim, dtype),
        k(RandomValues(rng, kKvHeads * kTokens * kDim, dtype), kKvHeads, kTokens, kDim, dtype,
          layout),
        row_positions(LastPositions(kRows, kTokens)) {
    // Observed rows need not be neighbours, nor see everything.
    row_positions[0] = 3;
    row_positions[1] = 700;
  }

  WindowArgs Args(const std::vector<HeadRows>& heads) const {
    WindowArgs args;
    args.q = q.queries();
    args.k = k.view();
    args.row_positions = row_positions;
    args.softmax_scale = scale;
    args.what = "layer 3";
    args.heads = heads;
    return args;
  }

  std::mt19937 rng;
  DenseTensor q;
  KvTensor k;
  std::vector<int64_t> row_positions;
  float scale = 0.2f;
};

double Reduced(const std::vector<double>& tile, const HeadRows& one, int64_t t) {
  double sum = 0.0;
  double max = 0.0;
  double last = 0.0;
  for (int64_t i = one.first_row; i < one.first_row + one.num_rows; ++i) {
    last = tile[(one.head * kRows + i) * kTokens + t];
    sum += last;
    max = std::max(max, last);
  }
  if (one.reduction == RowReduction::kMax) return max;
  if (one.reduction == RowReduction::kLast) return last;
  return one.reduction == RowReduction::kMean ? sum / static_cast<double>(one.num_rows) : sum;
}

// Three observations of one KV head, one of them of a head that is listed twice, one of the other.
std::vector<HeadRows> SomeHeads() {
  return {{1, 0, 12, RowReduction::kMean},
          {1, 4, 3, RowReduction::kMax},
          {3, 0, 12, RowReduction::kLast},
          {6, 2, 5, RowReduction::kSum}};
}

absl::StatusOr<std::vector<float>> Columns(const WindowArgs& args, int num_threads = 2) {
  BackendFixture fixture(num_threads);
  std::unique_ptr<ScoreBuffer> out =
      fixture.Buffer(static_cast<int64_t>(args.heads.size()), kTokens);
  const absl::Status status = fixture.backend().WindowColumns(fixture.context(), args, *out);
  if (!status.ok()) return status;
  return fixture.Values(*out);
}

void ExpectMatchesOracle(const std::vector<float>& columns, const Problem& problem,
                         const std::vector<HeadRows>& heads) {
  const std::vector<double> tile =
      AttentionOracle(problem.q, problem.k, problem.row_positions, problem.scale).tile;
  for (size_t j = 0; j < heads.size(); ++j) {
    for (int64_t t = 0; t < kTokens; ++t) {
      const double want = Reduced(tile, heads[j], t);
      ASSERT_NEAR(columns[j * kTokens + t], want, kRelative * want + kAbsolute) << j << " " << t;
    }
  }
}

TEST(HeadColumns, EveryListedObservationMatchesTheOracle) {
  for (const Layout layout : {Layout::kHnd, Layout::kNhd, Layout::kPaged}) {
    const Problem problem(DType::kBF16, layout);
    const std::vector<HeadRows> heads = SomeHeads();
    const auto columns = Columns(problem.Args(heads));
    ASSERT_TRUE(columns.ok()) << columns.status();
    ExpectMatchesOracle(*columns, problem, heads);
  }
}

TEST(HeadColumns, AGivenLogSumExpChangesNothing) {
  const Problem problem;
  const Attention attention =
      AttentionOracle(problem.q, problem.k, problem.row_positions, problem.scale);
  const DenseTensor lse(std::vector<float>(attention.lse.begin(), attention.lse.end()), kQoHeads,
                        kRows, 1, DType::kF32);
  const std::vector<HeadRows> heads = SomeHeads();
  WindowArgs args = problem.Args(heads);
  args.window_lse = lse.lse();
  const auto columns = Columns(args);
  ASSERT_TRUE(columns.ok()) << columns.status();
  ExpectMatchesOracle(*columns, problem, heads);
}

TEST(HeadColumns, TheSameBitsForAnyThreadCountAndAnyCompany) {
  const Problem problem;
  const std::vector<HeadRows> heads = SomeHeads();
  const std::vector<float> together = *Columns(problem.Args(heads), 1);
  EXPECT_EQ(*Columns(problem.Args(heads), 8), together);
  for (size_t j = 0; j < heads.size(); ++j) {
    const std::vector<HeadRows> alone = {heads[j]};
    const std::vector<float> row(together.begin() + j * kTokens,
                                 together.begin() + (j + 1) * kTokens);
    EXPECT_EQ(*Columns(problem.Args(alone)), row) << j;
  }
}

TEST(HeadColumns, KeysOfOtherKvHeadsAreNotRead) {
  Problem problem;
  for (int64_t t = 0; t < kTokens; ++t) {
    problem.k.Set(1, t, 0, std::numeric_limits<float>::quiet_NaN());
  }
  const std::vector<HeadRows> first_group = {{0, 0, kRows, RowReduction::kMean},
                                             {3, 0, kRows, RowReduction::kMax}};
  EXPECT_TRUE(Columns(problem.Args(first_group)).ok());
  const std::vector<HeadRows> second_group = {{4, 0, kRows, RowReduction::kMean}};
  EXPECT_FALSE(Columns(problem.Args(second_group)).ok());
}

TEST(HeadColumns, ARowBehindThePromptSeesAllOfIt) {
  Problem behind;
  behind.row_positions[kRows - 1] = kTokens + 40;
  Problem last;
  last.row_positions[kRows - 1] = kTokens - 1;
  const std::vector<HeadRows> heads = {{2, kRows - 1, 1, RowReduction::kMean}};
  EXPECT_EQ(*Columns(behind.Args(heads)), *Columns(last.Args(heads)));
}

TEST(HeadColumns, ATileGivesWhatQueriesGive) {
  const Problem problem;
  const Attention attention =
      AttentionOracle(problem.q, problem.k, problem.row_positions, problem.scale);
  const DenseTensor tile(std::vector<float>(attention.tile.begin(), attention.tile.end()), kQoHeads,
                         kRows, kTokens, DType::kF32);
  const std::vector<HeadRows> heads = SomeHeads();
  TileArgs args;
  args.tile = tile.tile();
  args.row_positions = problem.row_positions;
  args.what = "layer 3";
  args.heads = heads;
  BackendFixture fixture;
  std::unique_ptr<ScoreBuffer> out = fixture.Buffer(heads.size(), kTokens);
  ASSERT_TRUE(fixture.backend().TileColumns(fixture.context(), args, *out).ok());
  ExpectMatchesOracle(fixture.Values(*out), problem, heads);
}

TEST(HeadColumns, AHeadOutOfRangeIsRefused) {
  const Problem problem;
  const std::vector<HeadRows> heads = {{kQoHeads, 0, 1, RowReduction::kMean}};
  EXPECT_THAT(std::string(Columns(problem.Args(heads)).status().message()),
              HasSubstr("heads[0]: head 8, want 0..7"));
}

TEST(HeadColumns, RowsOutOfRangeAreRefused) {
  const Problem problem;
  const std::vector<HeadRows> heads = {{0, kRows - 1, 2, RowReduction::kMean}};
  EXPECT_THAT(std::string(Columns(problem.Args(heads)).status().message()),
              HasSubstr("heads[0]: 2 rows from 11"));
}

absl::StatusOr<std::vector<float>> Novelty(const KvTensor& k, const std::vector<int64_t>& heads,
                                           int num_threads = 2) {
  BackendFixture fixture(num_threads);
  std::unique_ptr<ScoreBuffer> out = fixture.Buffer(heads.size(), kTokens);
  const absl::Status status =
      fixture.backend().KeyNovelty(fixture.context(), k.view(), heads, "layer 2: k", *out);
  if (!status.ok()) return status;
  return fixture.Values(*out);
}

std::vector<double> NoveltyOracle(const KvTensor& k, int64_t head) {
  std::vector<double> mean(kDim, 0.0);
  std::vector<double> lengths(kTokens, 0.0);
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t c = 0; c < kDim; ++c) lengths[t] += std::pow(k.At(head, t, c), 2.0);
    lengths[t] = std::sqrt(lengths[t]);
    for (int64_t c = 0; c < kDim && lengths[t] > 0.0; ++c) mean[c] += k.At(head, t, c) / lengths[t];
  }
  double length = 0.0;
  for (const double value : mean) length += value * value;
  length = std::sqrt(length);
  std::vector<double> novelty(kTokens, 0.0);
  for (int64_t t = 0; t < kTokens; ++t) {
    double dot = 0.0;
    for (int64_t c = 0; c < kDim; ++c) dot += k.At(head, t, c) * mean[c];
    if (lengths[t] > 0.0) novelty[t] = -dot / (lengths[t] * length);
  }
  return novelty;
}

TEST(KeyNovelty, MatchesTheOracleInEveryTypeAndLayout) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const Layout layout : {Layout::kHnd, Layout::kNhd, Layout::kPaged}) {
      const Problem problem(dtype, layout);
      const auto novelty = Novelty(problem.k, {1, 0});
      ASSERT_TRUE(novelty.ok()) << novelty.status();
      for (const int64_t row : {int64_t{0}, int64_t{1}}) {
        const std::vector<double> want = NoveltyOracle(problem.k, 1 - row);
        for (int64_t t = 0; t < kTokens; ++t) {
          ASSERT_NEAR((*novelty)[row * kTokens + t], want[t], 1e-5) << t;
        }
      }
    }
  }
}

TEST(KeyNovelty, IsTheSameForAnyThreadCount) {
  const Problem problem;
  EXPECT_EQ(*Novelty(problem.k, {0, 1}, 1), *Novelty(problem.k, {0, 1}, 8));
}

TEST(KeyNovelty, AZeroKeyIsNeitherNewNorOld) {
  Problem problem;
  for (int64_t c = 0; c < kDim; ++c) problem.k.Set(0, 17, c, 0.0f);
  EXPECT_EQ((*Novelty(problem.k, {0}))[17], 0.0f);
}

TEST(KeyNovelty, KeysTooLargeToSquareAreMeasured) {
  Problem problem;
  for (int64_t c = 0; c < kDim; ++c) problem.k.Set(0, 17, c, 1e30f);
  const std::vector<double> want = NoveltyOracle(problem.k, 0);
  EXPECT_NEAR((*Novelty(problem.k, {0}))[17], want[17], 1e-5);
}

TEST(KeyNovelty, AValueThatIsNotFiniteIsNamed) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Problem problem;
    for (int64_t c = 0; c < kDim; ++c) problem.k.Set(1, 900, c, 0.0f);
    problem.k.Set(1, 900, 3, bad);
    EXPECT_THAT(std::string(Novelty(problem.k, {1}).status().message()),
                HasSubstr("layer 2: k: head 1 position 900 is not finite"));
    EXPECT_TRUE(Novelty(problem.k, {0}).ok());
  }
}

TEST(KeyNovelty, AHeadOutOfRangeIsRefused) {
  EXPECT_THAT(std::string(Novelty(Problem().k, {2}).status().message()),
              HasSubstr("KV head 2, want 0..1"));
}

std::vector<float> Normalized(Normalization normalization, std::vector<float> values, int64_t rows,
                              const std::vector<SelectArgs::Range>& excluded) {
  BackendFixture fixture;
  std::unique_ptr<ScoreBuffer> x = fixture.Buffer(rows, static_cast<int64_t>(values.size()) / rows);
  EXPECT_TRUE(fixture.backend().CopyFromHost(fixture.context(), values, *x).ok());
  EXPECT_TRUE(fixture.backend().NormalizeRows(fixture.context(), normalization, excluded, *x).ok());
  return fixture.Values(*x);
}

TEST(NormalizeRows, DividesByTheMaximumOutsideExcludedPositions) {
  EXPECT_THAT(Normalized(Normalization::kMax, {8, 1, 2, 4, 6, 3, 1, 2}, 2, {{0, 1}}),
              testing::ElementsAre(2.0f, 0.25f, 0.5f, 1.0f, 2.0f, 1.0f, testing::FloatEq(1.0f / 3),
                                   testing::FloatEq(2.0f / 3)));
}

TEST(NormalizeRows, DividesByTheSumOutsideExcludedPositions) {
  EXPECT_THAT(Normalized(Normalization::kSum, {8, 1, 3, 4}, 1, {{0, 1}, {3, 4}}),
              testing::ElementsAre(2.0f, 0.25f, 0.75f, 1.0f));
}

TEST(NormalizeRows, StandardizesOutsideExcludedPositions) {
  EXPECT_THAT(Normalized(Normalization::kStandardize, {9, 1, 3, 9}, 1, {{0, 1}, {3, 4}}),
              testing::ElementsAre(7.0f, -1.0f, 1.0f, 7.0f));
}

TEST(NormalizeRows, ARowWithoutScaleBecomesZero) {
  for (const Normalization normalization : {Normalization::kMax, Normalization::kSum}) {
    EXPECT_THAT(Normalized(normalization, {5, 0, 0}, 1, {{0, 1}}), testing::Each(0.0f));
  }
  EXPECT_THAT(Normalized(Normalization::kStandardize, {5, 2, 2}, 1, {{0, 1}}), testing::Each(0.0f));
  EXPECT_THAT(Normalized(Normalization::kStandardize, {5, 2}, 1, {{0, 2}}), testing::Each(0.0f));
}

TEST(NormalizeRows, RangesOutsideTheRowAreRefused) {
  BackendFixture fixture;
  std::unique_ptr<ScoreBuffer> x = fixture.Buffer(1, 4);
  const std::vector<SelectArgs::Range> ranges = {{2, 5}};
  EXPECT_EQ(
      fixture.backend().NormalizeRows(fixture.context(), Normalization::kMax, ranges, *x).code(),
      absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace keepset::kernels
