// Arithmetic that the host and the device compile, against plain loops.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cuda/column_inl.h"
#include "kernels/cuda/device_rows.h"
#include "kernels/cuda/element.h"
#include "kernels/cuda/fast_divider.h"
#include "kernels/cuda/fault_code.h"
#include "kernels/cuda/logit_tiles.h"
#include "kernels/row_sums.h"
#include "kernels/selection_plan.h"

namespace keepset::kernels::cuda {
namespace {

TEST(FastDivider, DividesExactly) {
  std::mt19937 rng(1);
  std::vector<uint32_t> divisors = {1,  2,   3,   5,   7,          16,        17,
                                    64, 127, 128, 129, 0x7ffffffe, 0x7fffffff};
  for (int i = 0; i < 200; ++i) divisors.push_back(1 + rng() % 0x7fffffffu);
  for (const uint32_t divisor : divisors) {
    const FastDivider divider(divisor);
    std::vector<uint32_t> dividends = {0, 1, divisor - 1, divisor, 0x7fffffff, 0x7ffffffe};
    if (divisor < 0x40000000u) dividends.push_back(2 * divisor - 1);
    for (int i = 0; i < 200; ++i) {
      dividends.push_back(rng() >> 1);
      // Just below and at a multiple, where a multiplier that is off would show.
      const uint32_t multiple = 0x7fffffffu / divisor * divisor;
      dividends.push_back(multiple);
      dividends.push_back(multiple == 0 ? 0 : multiple - 1);
    }
    for (const uint32_t dividend : dividends) {
      ASSERT_EQ(divider.Quotient(dividend), dividend / divisor) << dividend << " / " << divisor;
      ASSERT_EQ(divider.Remainder(dividend, divider.Quotient(dividend)), dividend % divisor);
    }
  }
}

TEST(Element, WidensEveryHalf) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const int exponent = static_cast<int>((bits >> 10) & 31);
    const int mantissa = static_cast<int>(bits & 1023);
    const float got = HalfBitsToFloat(static_cast<uint16_t>(bits));
    if (exponent == 31 && mantissa != 0) {
      ASSERT_TRUE(std::isnan(got));
      continue;
    }
    float want = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                 : exponent == 31 ? std::numeric_limits<float>::infinity()
                                  : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
    if ((bits & 0x8000) != 0) want = -want;
    ASSERT_EQ(got, want) << bits;
  }
}

TEST(DeviceRows, AddressesPagedRows) {
  const std::vector<int32_t> table = {4, 0, 3};
  DeviceRows rows;
  rows.head_bytes = 32;
  rows.token_bytes = 64;
  rows.block_bytes = 1000;
  rows.block_table = table.data();
  rows.block_size = FastDivider(5);
  EXPECT_EQ(rows.TokenOffset(0), 4000);
  EXPECT_EQ(rows.TokenOffset(4), 4000 + 4 * 64);
  EXPECT_EQ(rows.TokenOffset(5), 0);
  EXPECT_EQ(rows.TokenOffset(14), 3000 + 4 * 64);
}

TEST(DeviceRows, OffsetsBeyond32Bits) {
  DeviceRows rows;
  rows.token_bytes = int64_t{1} << 20;
  EXPECT_EQ(rows.TokenOffset(1 << 20), int64_t{1} << 40);
}

TEST(FaultCode, SmallerKindsAndPlacesComeFirst) {
  const int64_t far = (int64_t{1} << kFaultPlaceBits) - 1;
  EXPECT_LT(FaultCode(FaultKind::kKey, far), FaultCode(FaultKind::kLogit, 0));
  EXPECT_LT(FaultCode(FaultKind::kKey, 3), FaultCode(FaultKind::kKey, 4));
  EXPECT_LT(FaultCode(FaultKind::kTileSum, far), kNoFault);
  EXPECT_EQ(KindOfFault(FaultCode(FaultKind::kTileSum, far)), FaultKind::kTileSum);
  EXPECT_EQ(PlaceOfFault(FaultCode(FaultKind::kTileSum, far)), far);
}

// Every logit of the tile belongs to exactly one thread, and lanes that share rows differ in the
// lowest bits only.
template <typename Tile>
void ExpectTileIsCovered(int threads, int rows) {
  std::set<std::pair<int, int>> seen;
  for (int thread = 0; thread < threads; ++thread) {
    for (int r = 0; r < Tile::kRows; ++r) {
      EXPECT_EQ(Tile::Row(thread, r), Tile::Row(thread & ~(Tile::kLanesPerRow - 1), r));
      for (int c = 0; c < Tile::kColumns; ++c) {
        EXPECT_TRUE(seen.insert({Tile::Row(thread, r), Tile::Column(thread, c)}).second);
        EXPECT_TRUE(Tile::IsUsed(c, Tile::Column(thread, c) + 1));
      }
    }
  }
  EXPECT_EQ(static_cast<int>(seen.size()), rows * kTileColumns);
  EXPECT_EQ(seen.rbegin()->first, rows - 1);
}

TEST(ColumnCheck, WhatIsFiniteAndSmallIsNotSuspect) {
  ColumnCheck check;
  for (const float logit : {0.0f, -1e30f, 3e38f, 1e-40f}) check.SeeLogit(logit);
  check.SeeColumn(0.0f);
  check.SeeColumn(std::nextafter(kMostColumn, 0.0f));
  EXPECT_FALSE(check.IsSuspect());
}

TEST(ColumnCheck, OneLogitOrColumnIsEnoughUntilItIsCleared) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float nan = std::nanf("");
  ColumnCheck check;
  for (const float logit : {kInfinity, -kInfinity, nan}) {
    check.SeeLogit(logit);
    check.SeeLogit(1.0f);
    EXPECT_TRUE(check.IsSuspect()) << logit;
    check.Clear();
    EXPECT_FALSE(check.IsSuspect());
  }
  for (const float column : {kMostColumn, kInfinity, nan}) {
    check.SeeColumn(column);
    check.SeeColumn(1.0f);
    EXPECT_TRUE(check.IsSuspect()) << column;
    check.Clear();
  }
}

TEST(LogitTiles, MmaTileIsCovered) { ExpectTileIsCovered<MmaTile<DType::kBF16>>(96, 96); }

TEST(LogitTiles, FmaTileIsCovered) {
  ExpectTileIsCovered<FmaTile>(FmaTile::kThreads, FmaTile::kTileRows);
}

// Eight rows of a matrix are read at once, 16 bytes of each: they must lie in different banks.
TEST(LogitTiles, MatrixRowsLieInDifferentBanks) {
  for (int padded_dim = 16; padded_dim <= 512; padded_dim += 16) {
    std::set<int> quads;
    for (int row = 0; row < 8; ++row) {
      quads.insert(row * MmaTile<DType::kBF16>::PitchBytes(padded_dim) / 16 % 8);
    }
    EXPECT_EQ(quads.size(), 8u) << padded_dim;
  }
}

TEST(SelectionPlan, CandidatesWithinTheBudget) {
  EXPECT_EQ(WantedPositions({.length = 100, .open_candidates = 7, .budget = 10}), 7);
  EXPECT_EQ(WantedPositions({.length = 100, .open_candidates = 70, .budget = 10}), 10);
  EXPECT_EQ(
      WantedPositions({.length = 100, .num_protected = 4, .open_candidates = 70, .budget = 10}), 6);
}

TEST(SelectionPlan, LeastCountFillsUpToTheBudgetAndTheRow) {
  EXPECT_EQ(WantedPositions({.length = 100, .budget = 10, .min_kept = 3}), 3);
  EXPECT_EQ(WantedPositions({.length = 100, .budget = 10, .min_kept = 30}), 10);
  EXPECT_EQ(WantedPositions({.length = 4, .budget = 10, .min_kept = 30}), 4);
  EXPECT_EQ(WantedPositions({.length = 100, .num_protected = 5, .budget = 10, .min_kept = 3}), 0);
}

TEST(RowSums, BlockHoldsEveryValueOnce) {
  for (const int64_t count : {0, 1, 255, 256, 257, 8192}) {
    const double sum =
        SumBlock(10, 10 + count, [](int64_t t) { return static_cast<double>(t - 9); });
    EXPECT_EQ(sum, static_cast<double>(count * (count + 1) / 2));
  }
}

}  // namespace
}  // namespace keepset::kernels::cuda
