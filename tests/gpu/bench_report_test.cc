#include "tests/gpu/bench_report.h"

#include <numeric>
#include <vector>

#include "gtest/gtest.h"

namespace keepset::gpu {
namespace {

TEST(Quantile, IsAValueThatWasMeasured) {
  std::vector<double> values(100);
  std::iota(values.begin(), values.end(), 1.0);
  EXPECT_EQ(Quantile(values, 0.5), 50.0);
  EXPECT_EQ(Quantile(values, 0.99), 99.0);
  EXPECT_EQ(Quantile(values, 1.0), 100.0);
}

TEST(Quantile, OfFewValuesIsTheLargest) {
  EXPECT_EQ(Quantile({3.0, 1.0, 2.0}, 0.99), 3.0);
  EXPECT_EQ(Quantile({3.0, 1.0, 2.0}, 0.5), 2.0);
  EXPECT_EQ(Quantile({7.0}, 0.01), 7.0);
}

TEST(AddTimes, GivesMedianAndP99) {
  nlohmann::ordered_json line;
  AddTimes("device_ms", {2.0, 1.0, 9.0}, &line);
  EXPECT_EQ(line.dump(), R"({"device_ms":2.0,"device_ms_p99":9.0})");
}

TEST(WindowPath, SaysWhoComputedEverything) {
  EXPECT_EQ(WindowPath("cuda/sm_90"), "portable");
  EXPECT_EQ(WindowPath("cuda/sm_90/wgmma"), "hopper");
  EXPECT_EQ(WindowPath("cuda/sm_90/cublas"), "cublas");
  EXPECT_EQ(WindowPath("cuda/sm_90/wgmma+portable"), "mixed");
}

TEST(RepeatHostMilliseconds, LeavesWarmUpsOut) {
  int calls = 0;
  EXPECT_EQ(RepeatHostMilliseconds(3, [&] { ++calls; }).size(), 3u);
  EXPECT_GT(calls, 3);
}

}  // namespace
}  // namespace keepset::gpu
