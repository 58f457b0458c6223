// The tiny SnapKV case of the methods text, from the ops alone: mean over rows, last W columns
// dropped, average pool of 3, mean over the group, window columns above all others, top 5.
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/compute_backend.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {
namespace {

using ::testing::ElementsAre;

float Pattern(int64_t i, int64_t s) {
  return static_cast<float>((37 * i + 11 * s) % 17 - 8) / 8.0f;
}

TEST(SnapKvGolden, OpsGiveThePublishedScoresAndSets) {
  constexpr int64_t kQoHeads = 4;
  constexpr int64_t kKvHeads = 2;
  constexpr int64_t kTokens = 8;
  constexpr int64_t kWindow = 2;
  constexpr int64_t kDim = 2;
  std::vector<float> q;
  for (int64_t h = 0; h < kQoHeads; ++h) {
    for (int64_t i = 0; i < kWindow; ++i) {
      for (int64_t c = 0; c < kDim; ++c) q.push_back(Pattern(50 * h + 7 * i + c, 2));
    }
  }
  std::vector<float> k;
  for (int64_t g = 0; g < kKvHeads; ++g) {
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t c = 0; c < kDim; ++c) k.push_back(Pattern(100 * g + 3 * t + c, 1));
    }
  }
  const DenseTensor queries(q, kQoHeads, kWindow, kDim, DType::kBF16);
  const KvTensor keys(k, kKvHeads, kTokens, kDim, DType::kBF16, Layout::kNhd);
  const std::vector<int64_t> row_positions = LastPositions(kWindow, kTokens);
  WindowArgs args;
  args.q = queries.queries();
  args.k = keys.view();
  args.row_positions = row_positions;
  args.softmax_scale = 1.0f / std::sqrt(2.0f);
  args.what = "layer 0";

  BackendFixture fixture;
  ComputeBackend& backend = fixture.backend();
  OpContext& context = fixture.context();
  std::unique_ptr<ScoreBuffer> columns = fixture.Buffer(kQoHeads, kTokens);
  std::unique_ptr<ScoreBuffer> scores = fixture.Buffer(kKvHeads, kTokens);
  ASSERT_TRUE(backend.WindowColumns(context, args, *columns).ok());
  ASSERT_TRUE(backend.Pool(context, PoolKind::kAverage, 3, kTokens - kWindow, *columns).ok());
  ASSERT_TRUE(backend.MergeRows(context, *columns, Merge::kMean, {}, *scores).ok());
  ASSERT_TRUE(backend.Fill(context, kTokens - kWindow, kTokens, 0.144231f + 1.0f, *scores).ok());

  const std::vector<float> expected = {
      0.094484f, 0.136301f, 0.144231f, 0.133509f, 0.140316f, 0.090039f, 1.144231f, 1.144231f,
      0.084709f, 0.123395f, 0.129419f, 0.122613f, 0.129768f, 0.084380f, 1.144231f, 1.144231f};
  const std::vector<float> actual = fixture.Values(*scores);
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(actual[i], expected[i], 1e-6f) << i;

  SelectArgs select;
  select.budget = 5;
  absl::StatusOr<std::vector<Selection>> selections =
      backend.Select(context, *scores, {&select, 1});
  ASSERT_TRUE(selections.ok());
  EXPECT_THAT((*selections)[0].keep_indices, ElementsAre(1, 2, 4, 6, 7));
  EXPECT_THAT((*selections)[1].keep_indices, ElementsAre(1, 2, 4, 6, 7));
}

}  // namespace
}  // namespace keepset::kernels
