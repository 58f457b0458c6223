// Score glue of the CUDA backend: equal bits to the CPU twin, unless said otherwise.
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/compute_backend.h"
#include "tests/fakes/test_seed.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {
namespace {

std::vector<float> RandomScores(int64_t count, uint32_t seed) {
  std::mt19937 rng(fakes::TestSeed(seed));
  std::vector<float> values = RandomValues(rng, count, DType::kF32);
  for (float& value : values) value = std::fabs(value) + 0.01f;
  return values;
}

class GlueParity : public CudaTest {
 protected:
  using Op = std::function<absl::Status(const Machine& machine, ScoreBuffer& x)>;

  std::vector<float> After(const Machine& machine, int64_t rows, int64_t cols,
                           const std::vector<float>& values, const Op& op) {
    const std::unique_ptr<ScoreBuffer> x = machine.Buffer(rows, cols, values);
    const absl::Status status = op(machine, *x);
    EXPECT_TRUE(status.ok()) << status;
    return machine.Values(*x);
  }

  void ExpectSameBits(int64_t rows, int64_t cols, const Op& op) {
    const std::vector<float> values = RandomScores(rows * cols, 17);
    EXPECT_EQ(After(cuda_, rows, cols, values, op), After(cpu_, rows, cols, values, op));
  }
};

TEST_F(GlueParity, DivideByRowMean) {
  for (const int64_t cols : {1, 255, 257, 8193}) {
    ExpectSameBits(3, cols, [](const Machine& machine, ScoreBuffer& x) {
      return machine.backend->DivideByRowMean(*machine.context, 1e-8f, x);
    });
  }
}

TEST_F(GlueParity, NormalizeRows) {
  const std::vector<SelectArgs::Range> some = {{0, 4}, {31, 33}, {64, 64}, {200, 240}};
  for (const Normalization normalization :
       {Normalization::kMax, Normalization::kSum, Normalization::kStandardize}) {
    for (const int64_t cols : {300, 8193, 16500}) {
      for (const auto& excluded : {std::vector<SelectArgs::Range>(), some}) {
        ExpectSameBits(2, cols, [&](const Machine& machine, ScoreBuffer& x) {
          return machine.backend->NormalizeRows(*machine.context, normalization, excluded, x);
        });
      }
    }
  }
}

TEST_F(GlueParity, NormalizeRowsWithoutScaleGivesZeros) {
  const std::vector<SelectArgs::Range> first = {{0, 1}};
  const std::vector<SelectArgs::Range> all = {{0, 3}};
  for (const Normalization normalization :
       {Normalization::kMax, Normalization::kSum, Normalization::kStandardize}) {
    for (const auto& excluded : {first, all}) {
      const Op op = [&](const Machine& machine, ScoreBuffer& x) {
        return machine.backend->NormalizeRows(*machine.context, normalization, excluded, x);
      };
      EXPECT_EQ(After(cuda_, 1, 3, {5.0f, 0.0f, 0.0f}, op), std::vector<float>(3, 0.0f));
    }
  }
}

TEST_F(GlueParity, NormalizeRowsBySmallestNumbersGivesZeros) {
  const std::vector<float> values = {1e-45f, 0.0f};
  const Op op = [](const Machine& machine, ScoreBuffer& x) {
    return machine.backend->NormalizeRows(*machine.context, Normalization::kSum, {}, x);
  };
  EXPECT_EQ(After(cuda_, 1, 2, values, op), After(cpu_, 1, 2, values, op));
}

TEST_F(GlueParity, MergeRows) {
  for (const Merge merge : {Merge::kMean, Merge::kMax, Merge::kSum}) {
    for (const bool is_weighted : {false, true}) {
      ExpectSameBits(2, 301, [&](const Machine& machine, ScoreBuffer& x) {
        const std::vector<float> weights = {1.1f, 0.9f, 1.3f, 1.25f, 0.8f, 1.0f};
        const std::unique_ptr<ScoreBuffer> in = machine.Buffer(6, 301, RandomScores(6 * 301, 4));
        return machine.backend->MergeRows(
            *machine.context, *in, merge,
            is_weighted ? absl::MakeConstSpan(weights) : absl::Span<const float>(), x);
      });
    }
  }
}

TEST_F(GlueParity, Accumulate) {
  for (const Merge merge : {Merge::kSum, Merge::kMax}) {
    ExpectSameBits(2, 100, [&](const Machine& machine, ScoreBuffer& x) {
      const std::unique_ptr<ScoreBuffer> y = machine.Buffer(2, 100, RandomScores(200, 5));
      return machine.backend->Accumulate(*machine.context, *y, merge, 1.0f / 3.0f, x);
    });
  }
}

TEST_F(GlueParity, Multiply) {
  for (const int64_t y_rows : {1, 3}) {
    ExpectSameBits(3, 100, [&](const Machine& machine, ScoreBuffer& x) {
      const std::unique_ptr<ScoreBuffer> y =
          machine.Buffer(y_rows, 100, RandomScores(y_rows * 100, 5));
      return machine.backend->Multiply(*machine.context, *y, 0.7f, x);
    });
  }
}

TEST_F(GlueParity, Fill) {
  ExpectSameBits(3, 100, [](const Machine& machine, ScoreBuffer& x) {
    return machine.backend->Fill(*machine.context, 10, 99, -2.0f, x);
  });
}

TEST_F(GlueParity, FillOfNothing) {
  ExpectSameBits(3, 100, [](const Machine& machine, ScoreBuffer& x) {
    return machine.backend->Fill(*machine.context, 10, 10, -2.0f, x);
  });
}

TEST_F(GlueParity, NarrowAveragePool) {
  for (const int64_t kernel : {3, 7, 31}) {
    ExpectSameBits(2, 50, [&](const Machine& machine, ScoreBuffer& x) {
      return machine.backend->Pool(*machine.context, PoolKind::kAverage, kernel, 47, x);
    });
  }
}

// Prefix sums of the device are joined in another order, in fp64.
TEST_F(GlueParity, WideAveragePoolDiffersByRoundingOnly) {
  const std::vector<float> values = RandomScores(2 * 700, 17);
  for (const int64_t kernel : {33, 201, 1999}) {
    const Op op = [&](const Machine& machine, ScoreBuffer& x) {
      return machine.backend->Pool(*machine.context, PoolKind::kAverage, kernel, 650, x);
    };
    const std::vector<float> got = After(cuda_, 2, 700, values, op);
    const std::vector<float> want = After(cpu_, 2, 700, values, op);
    for (size_t i = 0; i < want.size(); ++i) {
      ASSERT_NEAR(got[i], want[i], 2e-7f * want[i]) << "kernel " << kernel << " at " << i;
    }
  }
}

TEST_F(GlueParity, MaximumPool) {
  for (const int64_t kernel : {3, 31, 33, 63, 65, 129, 1001, 100001}) {
    ExpectSameBits(2, 300, [&](const Machine& machine, ScoreBuffer& x) {
      return machine.backend->Pool(*machine.context, PoolKind::kMax, kernel, 290, x);
    });
  }
}

TEST_F(GlueParity, DilateForward) {
  for (const int64_t dilate : {1, 5, 31, 32, 64, 100, 299, 300, 5000}) {
    ExpectSameBits(2, 300, [&](const Machine& machine, ScoreBuffer& x) {
      return machine.backend->DilateForward(*machine.context, dilate, x);
    });
  }
}

TEST_F(GlueParity, NewBufferIsZero) {
  // A block that was used before.
  { const std::unique_ptr<ScoreBuffer> used = cuda_.Buffer(2, 64, std::vector<float>(128, 7.0f)); }
  const auto fresh = cuda_.backend->NewBuffer(2, 64);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  EXPECT_EQ(cuda_.Values(**fresh), std::vector<float>(128, 0.0f));
}

TEST_F(GlueParity, MassAndEntropy) {
  for (const int64_t cols : {1, 300, 9000}) {
    const std::vector<float> values = RandomScores(2 * cols, 3);
    const auto mass = [&](const Machine& machine) {
      const std::unique_ptr<ScoreBuffer> x = machine.Buffer(2, cols, values);
      return machine.backend->MassAndEntropy(*machine.context, *x, 1);
    };
    const auto got = mass(cuda_);
    const auto want = mass(cpu_);
    ASSERT_TRUE(got.ok() && want.ok());
    EXPECT_EQ(got->sum, want->sum);
    // The logarithms of two libraries differ in the last place.
    EXPECT_NEAR(got->entropy, want->entropy, 1e-12);
  }
}

TEST_F(GlueParity, MassOfZerosIsRefused) {
  const std::unique_ptr<ScoreBuffer> x = cuda_.Buffer(1, 100);
  const std::unique_ptr<ScoreBuffer> twin = cpu_.Buffer(1, 100);
  EXPECT_EQ(cuda_.backend->MassAndEntropy(*cuda_.context, *x, 0).status(),
            cpu_.backend->MassAndEntropy(*cpu_.context, *twin, 0).status());
}

TEST_F(GlueParity, RefusesWhatTheCpuRefuses) {
  const auto refused = [](const Machine& machine) {
    const std::unique_ptr<ScoreBuffer> x = machine.Buffer(2, 10);
    const std::unique_ptr<ScoreBuffer> y = machine.Buffer(3, 10);
    ComputeBackend& backend = *machine.backend;
    OpContext& context = *machine.context;
    std::vector<float> few(3);
    const std::vector<SelectArgs::Range> outside = {{2, 11}};
    return std::vector<absl::Status>{
        backend.MergeRows(context, *y, Merge::kMax, {}, *x),
        backend.Accumulate(context, *y, Merge::kSum, 1.0f, *x),
        backend.Multiply(context, *y, 1.0f, *x),
        backend.Pool(context, PoolKind::kMax, 2, 10, *x),
        backend.Pool(context, PoolKind::kMax, 3, 11, *x),
        backend.DilateForward(context, -1, *x),
        backend.NormalizeRows(context, Normalization::kMax, outside, *x),
        backend.Fill(context, 3, 2, 0.0f, *x),
        backend.MassAndEntropy(context, *x, 2).status(),
        backend.CopyToHost(context, *x, absl::MakeSpan(few)),
        backend.CopyFromHost(context, few, *x),
    };
  };
  const std::vector<absl::Status> got = refused(cuda_);
  EXPECT_EQ(got, refused(cpu_));
  for (const absl::Status& status : got) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  }
}

}  // namespace
}  // namespace keepset::kernels
