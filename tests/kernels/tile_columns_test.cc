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

constexpr int64_t kHeads = 3;
constexpr int64_t kRows = 5;
constexpr int64_t kTokens = 3000;
// Sums of five values in fp32.
constexpr double kRelative = 1e-6;

DenseTensor RandomTile(DType dtype) {
  std::mt19937 rng(2);
  std::vector<float> values = RandomValues(rng, kHeads * kRows * kTokens, dtype);
  for (float& value : values) value = std::fabs(value);
  return DenseTensor(values, kHeads, kRows, kTokens, dtype);
}

struct Outcome {
  absl::Status status;
  std::vector<float> columns;
};

Outcome Columns(const DenseTensor& tile, const std::vector<int64_t>& row_positions,
                RowReduction reduction, int num_threads = 2) {
  BackendFixture fixture(num_threads);
  TileArgs args;
  args.tile = tile.tile();
  args.row_positions = row_positions;
  args.reduction = reduction;
  args.what = "layer 5";
  std::unique_ptr<ScoreBuffer> out = fixture.Buffer(args.tile.num_qo_heads, args.tile.seq_len);
  Outcome outcome;
  outcome.status = fixture.backend().TileColumns(fixture.context(), args, *out);
  outcome.columns = fixture.Values(*out);
  return outcome;
}

TEST(TileColumns, MatchesOracleForEveryTypeAndReduction) {
  const std::vector<int64_t> row_positions = LastPositions(kRows, kTokens);
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const DenseTensor tile = RandomTile(dtype);
    std::vector<double> masked;
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t i = 0; i < kRows; ++i) {
        for (int64_t t = 0; t < kTokens; ++t) {
          masked.push_back(t <= row_positions[i] ? tile.At(h, i, t) : 0.0);
        }
      }
    }
    for (RowReduction reduction :
         {RowReduction::kMean, RowReduction::kSum, RowReduction::kMax, RowReduction::kLast}) {
      const Outcome outcome = Columns(tile, row_positions, reduction);
      ASSERT_TRUE(outcome.status.ok()) << outcome.status;
      const std::vector<double> expected = ReduceOracle(masked, kHeads, kRows, kTokens, reduction);
      for (size_t i = 0; i < expected.size(); ++i) {
        ASSERT_NEAR(outcome.columns[i], expected[i], kRelative * expected[i]);
      }
    }
  }
}

TEST(TileColumns, EntriesBeyondARowsPositionMayBeAnything) {
  DenseTensor tile = RandomTile(DType::kF32);
  const std::vector<int64_t> row_positions = {3, 10, 11, 2050, 2999};
  const Outcome clean = Columns(tile, row_positions, RowReduction::kMean);
  for (int64_t t = 4; t < kTokens; ++t) {
    tile.Set(1, 0, t, std::numeric_limits<float>::quiet_NaN());
  }
  tile.Set(2, 3, 2051, -1.0f);
  const Outcome outcome = Columns(tile, row_positions, RowReduction::kMean);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(outcome.columns, clean.columns);
}

TEST(TileColumns, BadValueNamesHeadRowAndPosition) {
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -0.25f}) {
    DenseTensor tile = RandomTile(DType::kBF16);
    tile.Set(2, 4, 2222, bad);
    const Outcome outcome = Columns(tile, LastPositions(kRows, kTokens), RowReduction::kMean);
    EXPECT_EQ(outcome.status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(outcome.status.message()),
                HasSubstr("layer 5: attn_tile: head 2 row 4 position 2222 is "));
  }
}

TEST(TileColumns, ThreadCountDoesNotShowInTheBits) {
  const DenseTensor tile = RandomTile(DType::kF32);
  const std::vector<int64_t> row_positions = LastPositions(kRows, kTokens);
  const std::vector<float> one = Columns(tile, row_positions, RowReduction::kMean, 1).columns;
  EXPECT_EQ(Columns(tile, row_positions, RowReduction::kMean, 2).columns, one);
  EXPECT_EQ(Columns(tile, row_positions, RowReduction::kMean, 8).columns, one);
}

}  // namespace
}  // namespace keepset::kernels
