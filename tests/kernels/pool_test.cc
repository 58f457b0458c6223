#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/compute_backend.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {
namespace {

using ::testing::ElementsAre;

constexpr int64_t kRows = 3;
constexpr int64_t kCols = 257;

std::vector<float> Pooled(PoolKind kind, int64_t kernel, int64_t length,
                          const std::vector<float>& values, int64_t rows = kRows) {
  BackendFixture fixture;
  std::unique_ptr<ScoreBuffer> x =
      fixture.Buffer(rows, static_cast<int64_t>(values.size()) / rows, values);
  const absl::Status status = fixture.backend().Pool(fixture.context(), kind, kernel, length, *x);
  EXPECT_TRUE(status.ok()) << status;
  return fixture.Values(*x);
}

std::vector<float> Random() {
  std::mt19937 rng(8);
  return RandomValues(rng, kRows * kCols, DType::kF32);
}

TEST(Pool, AverageMatchesOracleWithZeroPaddingCounted) {
  const std::vector<float> values = Random();
  for (int64_t kernel : {1, 3, 5, 31, 33, 255, 257, 1001}) {
    for (int64_t length : {0, 1, 2, 100, 257}) {
      const std::vector<float> out = Pooled(PoolKind::kAverage, kernel, length, values);
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t t = 0; t < kCols; ++t) {
          double expected = values[r * kCols + t];
          if (t < length) {
            expected = 0.0;
            for (int64_t i = t - kernel / 2; i <= t + kernel / 2; ++i) {
              if (i >= 0 && i < length) expected += values[r * kCols + i];
            }
            expected /= static_cast<double>(kernel);
          }
          ASSERT_NEAR(out[r * kCols + t], expected, 1e-6);
        }
      }
    }
  }
}

TEST(Pool, MaximumMatchesOracle) {
  const std::vector<float> values = Random();
  for (int64_t kernel : {1, 3, 7, 101, 257, 1001}) {
    for (int64_t length : {0, 1, 2, 100, 257}) {
      const std::vector<float> out = Pooled(PoolKind::kMax, kernel, length, values);
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t t = 0; t < kCols; ++t) {
          float expected = values[r * kCols + t];
          for (int64_t i = t - kernel / 2; i <= t + kernel / 2 && t < length; ++i) {
            if (i >= 0 && i < length) expected = std::max(expected, values[r * kCols + i]);
          }
          ASSERT_EQ(out[r * kCols + t], expected);
        }
      }
    }
  }
}

TEST(Pool, ImpossibleKernelsAndLengthsAreRefused) {
  BackendFixture fixture;
  std::unique_ptr<ScoreBuffer> x = fixture.Buffer(1, 4);
  ComputeBackend& backend = fixture.backend();
  for (int64_t kernel : {-3, 0, 2, 4}) {
    EXPECT_EQ(backend.Pool(fixture.context(), PoolKind::kAverage, kernel, 4, *x).code(),
              absl::StatusCode::kInvalidArgument);
  }
  for (int64_t length : {-1, 5}) {
    EXPECT_EQ(backend.Pool(fixture.context(), PoolKind::kMax, 3, length, *x).code(),
              absl::StatusCode::kInvalidArgument);
  }
}

TEST(Pool, HugeKernelsDoNotOverflow) {
  const int64_t kernel = std::numeric_limits<int64_t>::max();
  EXPECT_THAT(Pooled(PoolKind::kMax, kernel, 3, {1, 5, 2}, 1), ElementsAre(5, 5, 5));
  const std::vector<float> averages = Pooled(PoolKind::kAverage, kernel, 3, {1, 5, 2}, 1);
  for (float average : averages) EXPECT_NEAR(average, 0.0f, 1e-17f);
}

TEST(DilateForward, HitAlsoKeepsThePositionsAfterIt) {
  BackendFixture fixture;
  std::unique_ptr<ScoreBuffer> x = fixture.Buffer(2, 6, {0, 9, 0, 0, 0, 3, 1, 0, 0, 2, 0, 0});
  ASSERT_TRUE(fixture.backend().DilateForward(fixture.context(), 2, *x).ok());
  EXPECT_THAT(fixture.Values(*x), ElementsAre(0, 9, 9, 9, 0, 3, 1, 1, 1, 2, 2, 2));
}

TEST(DilateForward, MatchesOracleForEveryReach) {
  const std::vector<float> values = Random();
  for (int64_t dilate : {0, 1, 4, 63, 256, 257, 5000}) {
    BackendFixture fixture;
    std::unique_ptr<ScoreBuffer> x = fixture.Buffer(kRows, kCols, values);
    ASSERT_TRUE(fixture.backend().DilateForward(fixture.context(), dilate, *x).ok());
    const std::vector<float> out = fixture.Values(*x);
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t t = 0; t < kCols; ++t) {
        float expected = values[r * kCols + t];
        for (int64_t j = 1; j <= std::min(dilate, t); ++j) {
          expected = std::max(expected, values[r * kCols + t - j]);
        }
        ASSERT_EQ(out[r * kCols + t], expected);
      }
    }
  }
}

TEST(DilateForward, NegativeReachIsRefused) {
  BackendFixture fixture;
  std::unique_ptr<ScoreBuffer> x = fixture.Buffer(1, 4);
  EXPECT_EQ(fixture.backend().DilateForward(fixture.context(), -1, *x).code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace keepset::kernels
