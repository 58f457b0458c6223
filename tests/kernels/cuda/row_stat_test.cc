// Statistics of rows joined over the lanes of a warp, on the emulator.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/row_stat_inl.h"
#include "tests/kernels/cuda/simt_emulator.h"

namespace keepset::kernels::cuda {
namespace {

constexpr int kLanes = 32;

// What every lane has after kJoined neighbouring ones were joined.
template <int kJoined>
std::vector<RowStat> Join(const std::vector<RowStat>& stats) {
  std::vector<RowStat> joined(kLanes);
  LaunchShape shape;
  shape.threads = kLanes;
  EmulateGrid(shape, [&](const EmulatedThread& simt) {
    joined[simt.lane()] = JoinLaneStats<kJoined>(simt, stats[simt.lane()]);
  });
  return joined;
}

std::vector<RowStat> RandomStats(uint32_t seed) {
  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> max(-30.0f, 30.0f);
  std::uniform_real_distribution<float> sum(1.0f, 128.0f);
  std::vector<RowStat> stats;
  for (int lane = 0; lane < kLanes; ++lane) stats.push_back({max(rng), sum(rng)});
  return stats;
}

template <int kJoined>
void ExpectGroupsAreJoined() {
  const std::vector<RowStat> stats = RandomStats(kJoined);
  const std::vector<RowStat> joined = Join<kJoined>(stats);
  for (int first = 0; first < kLanes; first += kJoined) {
    double max = -std::numeric_limits<double>::infinity();
    double sum = 0.0;
    for (int lane = first; lane < first + kJoined; ++lane) {
      max = std::max<double>(max, stats[lane].max);
      sum += stats[lane].sum * std::exp2(static_cast<double>(stats[lane].max));
    }
    for (int lane = first; lane < first + kJoined; ++lane) {
      EXPECT_EQ(joined[lane].max, max) << lane;
      EXPECT_NEAR(joined[lane].sum, sum / std::exp2(max), 1e-5 * joined[lane].sum) << lane;
      EXPECT_EQ(joined[lane].sum, joined[first].sum) << lane;
    }
  }
}

TEST(JoinLaneStats, GroupsOfLanesAreJoinedAndAgree) {
  ExpectGroupsAreJoined<4>();
  ExpectGroupsAreJoined<16>();
  ExpectGroupsAreJoined<32>();
}

TEST(JoinLaneStats, LanesThatSeeNothingDoNotCount) {
  const RowStat nothing = {MinusInfinity(), 0.0f};
  std::vector<RowStat> stats(kLanes, nothing);
  stats[5] = {3.5f, 7.0f};
  const std::vector<RowStat> joined = Join<4>(stats);
  EXPECT_EQ(joined[6].max, 3.5f);
  EXPECT_EQ(joined[6].sum, 7.0f);
  EXPECT_EQ(joined[3].max, MinusInfinity());
  EXPECT_EQ(joined[3].sum, 0.0f);
}

TEST(JoinLaneStats, NanStaysInTheSum) {
  std::vector<RowStat> stats = RandomStats(3);
  stats[9].sum = std::numeric_limits<float>::quiet_NaN();
  const std::vector<RowStat> joined = Join<4>(stats);
  EXPECT_TRUE(std::isnan(joined[10].sum));
  EXPECT_FALSE(std::isnan(joined[12].sum));
}

TEST(JoinLaneStats, InfiniteLogitsShow) {
  std::vector<RowStat> stats = RandomStats(4);
  stats[1].max = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(std::isnan(Join<4>(stats)[0].sum));
}

}  // namespace
}  // namespace keepset::kernels::cuda
