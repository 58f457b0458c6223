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

constexpr int64_t kHeads = 2;
constexpr int64_t kTokens = 1100;
// A sum of a few hundred squares and one root in fp32.
constexpr double kRelative = 3e-6;

KvTensor RandomTensor(int64_t head_dim, DType dtype, Layout layout, float sigma = 1.0f) {
  std::mt19937 rng(9);
  return KvTensor(RandomValues(rng, kHeads * kTokens * head_dim, dtype, sigma), kHeads, kTokens,
                  head_dim, dtype, layout);
}

absl::StatusOr<std::vector<float>> Norms(const KvTensor& x, int num_threads = 2) {
  BackendFixture fixture(num_threads);
  std::unique_ptr<ScoreBuffer> out = fixture.Buffer(kHeads, kTokens);
  const absl::Status status =
      fixture.backend().RowNorms(fixture.context(), x.view(), "layer 2: v", *out);
  if (!status.ok()) return status;
  return fixture.Values(*out);
}

void ExpectMatchesOracle(const KvTensor& x) {
  absl::StatusOr<std::vector<float>> norms = Norms(x);
  ASSERT_TRUE(norms.ok()) << norms.status();
  for (int64_t g = 0; g < kHeads; ++g) {
    for (int64_t t = 0; t < kTokens; ++t) {
      double sum = 0.0;
      for (int64_t c = 0; c < x.view().head_dim; ++c) {
        sum += static_cast<double>(x.At(g, t, c)) * x.At(g, t, c);
      }
      const double expected = std::sqrt(sum);
      ASSERT_NEAR((*norms)[g * kTokens + t], expected, kRelative * expected);
    }
  }
}

TEST(RowNorms, MatchesOracleForEveryHeadDim) {
  for (int64_t head_dim : {1, 3, 32, 80, 96, 128, 192}) {
    ExpectMatchesOracle(RandomTensor(head_dim, DType::kF32, Layout::kNhd));
  }
}

TEST(RowNorms, MatchesOracleForEveryTypeAndLayout) {
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (Layout layout : {Layout::kNhd, Layout::kHnd, Layout::kPaged}) {
      ExpectMatchesOracle(RandomTensor(37, dtype, layout));
    }
  }
}

TEST(RowNorms, SquaresMayLeaveTheRangeOfFp32) {
  ExpectMatchesOracle(RandomTensor(64, DType::kF32, Layout::kHnd, 1e25f));
  ExpectMatchesOracle(RandomTensor(64, DType::kBF16, Layout::kHnd, 1e-30f));
}

TEST(RowNorms, HalfSubnormalsCount) {
  ExpectMatchesOracle(RandomTensor(64, DType::kF16, Layout::kHnd, 1e-6f));
}

TEST(RowNorms, ZeroRowHasNormZero) {
  const KvTensor x(std::vector<float>(kHeads * kTokens * 8, 0.0f), kHeads, kTokens, 8, DType::kF32,
                   Layout::kHnd);
  absl::StatusOr<std::vector<float>> norms = Norms(x);
  ASSERT_TRUE(norms.ok());
  EXPECT_EQ(*norms, std::vector<float>(kHeads * kTokens, 0.0f));
}

TEST(RowNorms, NonFiniteValueNamesHeadAndPosition) {
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      KvTensor x = RandomTensor(33, dtype, Layout::kPaged);
      x.Set(1, 1023, 32, bad);
      const absl::Status status = Norms(x).status();
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(std::string(status.message()),
                  HasSubstr("layer 2: v: head 1 position 1023 is not finite"));
    }
  }
}

TEST(RowNorms, NormBeyondFp32IsRefused) {
  KvTensor x = RandomTensor(16, DType::kF32, Layout::kHnd);
  for (int64_t c = 0; c < 16; ++c) x.Set(0, 7, c, 3e38f);
  EXPECT_EQ(Norms(x).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(RowNorms, ThreadCountDoesNotShowInTheBits) {
  const KvTensor x = RandomTensor(80, DType::kF32, Layout::kHnd);
  const std::vector<float> one = *Norms(x, 1);
  EXPECT_EQ(*Norms(x, 2), one);
  EXPECT_EQ(*Norms(x, 8), one);
}

TEST(RowNorms, DoubledValuesLeaveTheRatiosToTheMean) {
  KvTensor x = RandomTensor(32, DType::kF32, Layout::kHnd);
  BackendFixture fixture;
  const auto ratios = [&] {
    std::unique_ptr<ScoreBuffer> out = fixture.Buffer(kHeads, kTokens);
    EXPECT_TRUE(fixture.backend().RowNorms(fixture.context(), x.view(), "v", *out).ok());
    EXPECT_TRUE(fixture.backend().DivideByRowMean(fixture.context(), 1e-8f, *out).ok());
    return fixture.Values(*out);
  };
  const std::vector<float> before = ratios();
  for (int64_t g = 0; g < kHeads; ++g) {
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t c = 0; c < 32; ++c) x.Set(g, t, c, 2.0f * x.At(g, t, c));
    }
  }
  EXPECT_EQ(ratios(), before);
}

}  // namespace
}  // namespace keepset::kernels
