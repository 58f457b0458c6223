#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
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
using ::testing::FloatEq;

// More columns than one block of the implementation.
constexpr int64_t kCols = 20000;
constexpr double kRelative = 1e-5;

std::vector<float> RandomPositive(int64_t count, uint32_t seed = 1) {
  std::mt19937 rng(seed);
  std::vector<float> values = RandomValues(rng, count, DType::kF32);
  for (float& value : values) value = std::fabs(value);
  return values;
}

TEST(DivideByRowMean, MakesTheMeanOfEveryRowOne) {
  BackendFixture fixture;
  const std::vector<float> values = RandomPositive(3 * kCols);
  std::unique_ptr<ScoreBuffer> x = fixture.Buffer(3, kCols, values);
  ASSERT_TRUE(fixture.backend().DivideByRowMean(fixture.context(), 1e-8f, *x).ok());
  const std::vector<float> out = fixture.Values(*x);
  for (int64_t r = 0; r < 3; ++r) {
    double mean = 0.0;
    for (int64_t t = 0; t < kCols; ++t) mean += values[r * kCols + t] / double{kCols};
    for (int64_t t = 0; t < kCols; ++t) {
      const double expected = values[r * kCols + t] / mean;
      ASSERT_NEAR(out[r * kCols + t], expected, 1e-6 * expected);
    }
  }
}

TEST(DivideByRowMean, EpsilonBoundsTheDivisor) {
  BackendFixture fixture;
  std::unique_ptr<ScoreBuffer> x = fixture.Buffer(1, 2, {0.0f, 1e-9f});
  ASSERT_TRUE(fixture.backend().DivideByRowMean(fixture.context(), 1e-8f, *x).ok());
  EXPECT_THAT(fixture.Values(*x), ElementsAre(0.0f, FloatEq(0.1f)));
}

TEST(MergeRows, MergesConsecutiveRowsWithWeights) {
  BackendFixture fixture;
  const std::vector<float> weights = {1.0f, 0.5f, 2.0f, 1.0f};
  std::unique_ptr<ScoreBuffer> in = fixture.Buffer(4, 2, {1, 2, 4, 8, 3, -1, 5, -3});
  std::unique_ptr<ScoreBuffer> out = fixture.Buffer(2, 2);
  ComputeBackend& backend = fixture.backend();
  ASSERT_TRUE(backend.MergeRows(fixture.context(), *in, Merge::kSum, weights, *out).ok());
  EXPECT_THAT(fixture.Values(*out), ElementsAre(3.0f, 6.0f, 11.0f, -5.0f));
  ASSERT_TRUE(backend.MergeRows(fixture.context(), *in, Merge::kMean, weights, *out).ok());
  EXPECT_THAT(fixture.Values(*out), ElementsAre(1.5f, 3.0f, 5.5f, -2.5f));
  ASSERT_TRUE(backend.MergeRows(fixture.context(), *in, Merge::kMax, weights, *out).ok());
  EXPECT_THAT(fixture.Values(*out), ElementsAre(2.0f, 4.0f, 6.0f, -2.0f));
  ASSERT_TRUE(backend.MergeRows(fixture.context(), *in, Merge::kMax, {}, *out).ok());
  EXPECT_THAT(fixture.Values(*out), ElementsAre(4.0f, 8.0f, 5.0f, -1.0f));
}

TEST(MergeRows, ShapesThatDoNotFitAreRefused) {
  BackendFixture fixture;
  ComputeBackend& backend = fixture.backend();
  std::unique_ptr<ScoreBuffer> in = fixture.Buffer(4, 2);
  std::unique_ptr<ScoreBuffer> three = fixture.Buffer(3, 2);
  std::unique_ptr<ScoreBuffer> wide = fixture.Buffer(2, 3);
  std::unique_ptr<ScoreBuffer> out = fixture.Buffer(2, 2);
  const std::vector<float> weights(3, 1.0f);
  EXPECT_FALSE(backend.MergeRows(fixture.context(), *in, Merge::kSum, {}, *three).ok());
  EXPECT_FALSE(backend.MergeRows(fixture.context(), *in, Merge::kSum, {}, *wide).ok());
  EXPECT_FALSE(backend.MergeRows(fixture.context(), *in, Merge::kSum, weights, *out).ok());
}

TEST(Accumulate, AddsOrTakesTheMaximumOfWeightedValues) {
  BackendFixture fixture;
  ComputeBackend& backend = fixture.backend();
  std::unique_ptr<ScoreBuffer> x = fixture.Buffer(1, 3, {1, 2, -3});
  std::unique_ptr<ScoreBuffer> acc = fixture.Buffer(1, 3, {10, 1, 1});
  ASSERT_TRUE(backend.Accumulate(fixture.context(), *x, Merge::kSum, 2.0f, *acc).ok());
  EXPECT_THAT(fixture.Values(*acc), ElementsAre(12.0f, 5.0f, -5.0f));
  ASSERT_TRUE(backend.Accumulate(fixture.context(), *x, Merge::kMean, 1.0f, *acc).ok());
  EXPECT_THAT(fixture.Values(*acc), ElementsAre(13.0f, 7.0f, -8.0f));
  ASSERT_TRUE(backend.Accumulate(fixture.context(), *x, Merge::kMax, 4.0f, *acc).ok());
  EXPECT_THAT(fixture.Values(*acc), ElementsAre(13.0f, 8.0f, -8.0f));
}

TEST(Multiply, TakesOneRowOrAllRows) {
  BackendFixture fixture;
  ComputeBackend& backend = fixture.backend();
  std::unique_ptr<ScoreBuffer> x = fixture.Buffer(2, 2, {1, 2, 3, 4});
  std::unique_ptr<ScoreBuffer> one = fixture.Buffer(1, 2, {2, 3});
  std::unique_ptr<ScoreBuffer> all = fixture.Buffer(2, 2, {1, 0, 0, 1});
  ASSERT_TRUE(backend.Multiply(fixture.context(), *one, 0.5f, *x).ok());
  EXPECT_THAT(fixture.Values(*x), ElementsAre(1.0f, 3.0f, 3.0f, 6.0f));
  ASSERT_TRUE(backend.Multiply(fixture.context(), *all, 1.0f, *x).ok());
  EXPECT_THAT(fixture.Values(*x), ElementsAre(1.0f, 0.0f, 0.0f, 6.0f));
}

TEST(Fill, WritesTheRangeOfEveryRow) {
  BackendFixture fixture;
  std::unique_ptr<ScoreBuffer> x = fixture.Buffer(2, 3);
  ASSERT_TRUE(fixture.backend().Fill(fixture.context(), 1, 3, 7.0f, *x).ok());
  EXPECT_THAT(fixture.Values(*x), ElementsAre(0, 7, 7, 0, 7, 7));
  EXPECT_FALSE(fixture.backend().Fill(fixture.context(), 2, 4, 7.0f, *x).ok());
  EXPECT_FALSE(fixture.backend().Fill(fixture.context(), -1, 2, 7.0f, *x).ok());
}

TEST(MassAndEntropy, MatchesOracle) {
  BackendFixture fixture;
  const std::vector<float> values = RandomPositive(2 * kCols);
  std::unique_ptr<ScoreBuffer> x = fixture.Buffer(2, kCols, values);
  double sum = 0.0;
  for (int64_t t = 0; t < kCols; ++t) sum += values[kCols + t];
  double entropy = 0.0;
  for (int64_t t = 0; t < kCols; ++t) {
    const double p = values[kCols + t] / sum;
    entropy -= p * std::log(std::max(p, 1e-8));
  }
  absl::StatusOr<ComputeBackend::Mass> mass =
      fixture.backend().MassAndEntropy(fixture.context(), *x, 1);
  ASSERT_TRUE(mass.ok());
  EXPECT_NEAR(mass->sum, sum, 1e-9 * sum);
  EXPECT_NEAR(mass->entropy, entropy, 1e-9 * entropy);
}

TEST(MassAndEntropy, UniformMassHasTheLogarithmOfTheLength) {
  BackendFixture fixture;
  std::unique_ptr<ScoreBuffer> x = fixture.Buffer(1, 4096, std::vector<float>(4096, 0.25f));
  absl::StatusOr<ComputeBackend::Mass> mass =
      fixture.backend().MassAndEntropy(fixture.context(), *x, 0);
  ASSERT_TRUE(mass.ok());
  EXPECT_NEAR(mass->entropy, std::log(4096.0), 1e-12);
}

TEST(MassAndEntropy, UnusableMassIsRefused) {
  BackendFixture fixture;
  for (float bad : {0.0f, -1.0f, std::numeric_limits<float>::quiet_NaN(),
                    std::numeric_limits<float>::infinity()}) {
    std::unique_ptr<ScoreBuffer> x = fixture.Buffer(1, 1, {bad});
    EXPECT_EQ(fixture.backend().MassAndEntropy(fixture.context(), *x, 0).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
}

TEST(ScoreOps, ThreadCountDoesNotShowInTheBits) {
  const std::vector<float> values = RandomPositive(6 * kCols);
  std::vector<std::vector<float>> results;
  std::vector<double> entropies;
  for (int num_threads : {1, 2, 8}) {
    BackendFixture fixture(num_threads);
    ComputeBackend& backend = fixture.backend();
    std::unique_ptr<ScoreBuffer> x = fixture.Buffer(6, kCols, values);
    std::unique_ptr<ScoreBuffer> merged = fixture.Buffer(2, kCols);
    ASSERT_TRUE(backend.DivideByRowMean(fixture.context(), 1e-8f, *x).ok());
    ASSERT_TRUE(backend.MergeRows(fixture.context(), *x, Merge::kMean, {}, *merged).ok());
    ASSERT_TRUE(backend.Pool(fixture.context(), PoolKind::kAverage, 5, kCols, *merged).ok());
    results.push_back(fixture.Values(*merged));
    entropies.push_back(backend.MassAndEntropy(fixture.context(), *merged, 1)->entropy);
  }
  EXPECT_EQ(results[1], results[0]);
  EXPECT_EQ(results[2], results[0]);
  EXPECT_EQ(entropies[1], entropies[0]);
  EXPECT_EQ(entropies[2], entropies[0]);
}

TEST(ScoreBuffer, StartsWithZeros) {
  BackendFixture fixture;
  EXPECT_EQ(fixture.Values(*fixture.Buffer(3, 7)), std::vector<float>(21, 0.0f));
}

TEST(ScoreBuffer, ImpossibleSizesAreRefused) {
  BackendFixture fixture;
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max() / 2;
  for (int64_t rows : {int64_t{0}, int64_t{-1}, kHuge}) {
    EXPECT_EQ(fixture.backend().NewBuffer(rows, 4).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
}

int64_t ResidentBytes() {
  int64_t total_pages = 0;
  int64_t resident_pages = 0;
  std::ifstream("/proc/self/statm") >> total_pages >> resident_pages;
  return resident_pages * sysconf(_SC_PAGESIZE);
}

TEST(ScoreBuffer, HoldsNoMemoryBeforeItIsWritten) {
  BackendFixture fixture;
  const int64_t before = ResidentBytes();
  const std::unique_ptr<ScoreBuffer> x = fixture.Buffer(256, int64_t{1} << 20);
  EXPECT_LT(ResidentBytes() - before, int64_t{512} << 20);
  x->data()[(int64_t{256} << 20) - 1] = 1.0f;
}

TEST(ScoreBuffer, IsAlignedToACacheLine) {
  BackendFixture fixture;
  for (const int64_t cols : {1, 7, 4096, 1 << 20}) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(fixture.Buffer(1, cols)->data()) % 64, 0u);
  }
}

TEST(ScoreBuffer, CopiesOfAnotherSizeAreRefused) {
  BackendFixture fixture;
  std::unique_ptr<ScoreBuffer> x = fixture.Buffer(2, 3);
  std::vector<float> host(5);
  EXPECT_FALSE(fixture.backend().CopyToHost(fixture.context(), *x, absl::MakeSpan(host)).ok());
  EXPECT_FALSE(fixture.backend().CopyFromHost(fixture.context(), host, *x).ok());
}

}  // namespace
}  // namespace keepset::kernels
