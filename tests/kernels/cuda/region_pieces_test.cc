#include "kernels/cuda/region_pieces.h"

#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace keepset::kernels::cuda {
namespace {

TEST(RegionPieces, LendsFromTheBeginningInWholeUnits) {
  RegionPieces pieces(1024);
  EXPECT_EQ(pieces.Take(1), 0);
  EXPECT_EQ(pieces.Take(257), 256);
  EXPECT_EQ(pieces.free_bytes(), 256);
  EXPECT_EQ(pieces.Take(257), std::nullopt);
  EXPECT_EQ(pieces.Take(256), 768);
  EXPECT_EQ(pieces.largest_free(), 0);
}

TEST(RegionPieces, BytesBehindTheLastWholeUnitAreNotLent) {
  RegionPieces pieces(1023);
  EXPECT_EQ(pieces.bytes(), 768);
  EXPECT_EQ(pieces.Take(769), std::nullopt);
}

TEST(RegionPieces, NeighboursBecomeOneWhicheverReturnsFirst) {
  const std::vector<std::vector<int64_t>> orders = {{0, 256, 512}, {512, 256, 0}, {0, 512, 256}};
  for (const std::vector<int64_t>& order : orders) {
    RegionPieces pieces(768);
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(pieces.Take(256).has_value());
    for (const int64_t offset : order) pieces.Return(offset, 256);
    EXPECT_EQ(pieces.largest_free(), 768);
    EXPECT_EQ(pieces.Take(768), 0);
  }
}

TEST(RegionPieces, HoleBeforeTheEndIsUsedFirst) {
  RegionPieces pieces(2048);
  ASSERT_EQ(pieces.Take(512), 0);
  ASSERT_EQ(pieces.Take(256), 512);
  pieces.Return(0, 512);
  EXPECT_EQ(pieces.Take(768), 768);
  EXPECT_EQ(pieces.Take(300), 0);
  EXPECT_EQ(pieces.peak_end(), 1536);
}

// Random takes and returns against a map of units: pieces never overlap, none is refused that has
// room, and the same sequence fits a range that ends where it ended.
TEST(RegionPieces, LendsWhatIsFreeAndNothingTwice) {
  constexpr int64_t kUnit = RegionPieces::kAlignment;
  constexpr int64_t kUnits = 64;
  for (uint32_t seed = 1; seed <= 20; ++seed) {
    struct Step {
      int64_t bytes = 0;  // 0: returns
      int64_t offset = 0;
      int64_t returned_bytes = 0;
    };
    std::vector<Step> steps;
    std::mt19937 rng(seed);
    RegionPieces pieces(kUnits * kUnit);
    std::vector<bool> is_lent(kUnits, false);
    std::vector<Step> lent;
    for (int i = 0; i < 400; ++i) {
      if (rng() % 2 == 0 && !lent.empty()) {
        const size_t which = rng() % lent.size();
        const Step step = lent[which];
        lent.erase(lent.begin() + static_cast<std::ptrdiff_t>(which));
        pieces.Return(step.offset, step.bytes);
        const int64_t units = RegionPieces::SizeOf(step.bytes) / kUnit;
        for (int64_t u = 0; u < units; ++u) is_lent[step.offset / kUnit + u] = false;
        steps.push_back({0, step.offset, step.bytes});
        continue;
      }
      const int64_t bytes = 1 + static_cast<int64_t>(rng() % (12 * kUnit));
      const int64_t units = RegionPieces::SizeOf(bytes) / kUnit;
      int64_t first = -1;
      for (int64_t u = 0, run = 0; u < kUnits && first < 0; ++u) {
        run = is_lent[u] ? 0 : run + 1;
        if (run == units) first = u - units + 1;
      }
      const std::optional<int64_t> offset = pieces.Take(bytes);
      ASSERT_EQ(offset.has_value(), first >= 0) << "seed " << seed << " step " << i;
      if (!offset.has_value()) continue;
      ASSERT_EQ(*offset, first * kUnit) << "seed " << seed << " step " << i;
      for (int64_t u = 0; u < units; ++u) is_lent[first + u] = true;
      lent.push_back({bytes, *offset, 0});
      steps.push_back(lent.back());
    }
    RegionPieces same(pieces.peak_end());
    for (const Step& step : steps) {
      if (step.bytes > 0) {
        ASSERT_EQ(same.Take(step.bytes), step.offset) << "seed " << seed;
      } else {
        same.Return(step.offset, step.returned_bytes);
      }
    }
  }
}

TEST(RegionPieces, SizeNearTheLargestNumberFitsNowhere) {
  RegionPieces pieces(4096);
  EXPECT_EQ(pieces.Take(std::numeric_limits<int64_t>::max()), std::nullopt);
  EXPECT_EQ(pieces.free_bytes(), 4096);
  EXPECT_EQ(pieces.Take(4096), 0);
}

}  // namespace
}  // namespace keepset::kernels::cuda
