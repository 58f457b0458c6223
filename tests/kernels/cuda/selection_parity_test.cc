// Selection of the CUDA backend: equal scores in, identical keep sets out, bit for bit.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
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

using Range = SelectArgs::Range;

// `levels` different values, so that ties are planted everywhere; 0: hardly any tie.
std::vector<float> Scores(int64_t count, int levels, uint32_t seed) {
  std::mt19937 rng(fakes::TestSeed(seed));
  std::vector<float> scores(count);
  std::normal_distribution<float> normal;
  for (float& score : scores) {
    score = normal(rng);
    if (levels > 0) score = std::round(score * static_cast<float>(levels)) / 8.0f;
  }
  return scores;
}

class SelectionParity : public CudaTest {
 protected:
  absl::StatusOr<std::vector<Selection>> SelectOn(const Machine& machine,
                                                  const std::vector<float>& scores, int64_t rows,
                                                  const std::vector<SelectArgs>& args) {
    const std::unique_ptr<ScoreBuffer> buffer =
        machine.Buffer(rows, static_cast<int64_t>(scores.size()) / rows, scores);
    machine.PoisonKeptMemory();
    return machine.backend->Select(*machine.context, *buffer, args);
  }

  void ExpectSame(const std::vector<float>& scores, int64_t rows,
                  const std::vector<SelectArgs>& args) {
    const auto got = SelectOn(cuda_, scores, rows, args);
    const auto want = SelectOn(cpu_, scores, rows, args);
    ASSERT_EQ(got.status(), want.status());
    if (!got.ok()) return;
    ASSERT_EQ(got->size(), want->size());
    for (size_t row = 0; row < got->size(); ++row) {
      EXPECT_EQ((*got)[row].keep_indices, (*want)[row].keep_indices) << "row " << row;
      EXPECT_EQ((*got)[row].candidates, (*want)[row].candidates) << "row " << row;
      EXPECT_EQ((*got)[row].filled, (*want)[row].filled) << "row " << row;
    }
  }
};

TEST_F(SelectionParity, EveryLengthAndBudget) {
  for (const int64_t length : {1, 2, 31, 32, 33, 127, 128, 129, 511, 1000}) {
    for (const int64_t budget :
         {int64_t{0}, int64_t{1}, length / 3, length - 1, length, length + 5}) {
      SelectArgs args;
      args.budget = budget;
      ExpectSame(Scores(length, 0, static_cast<uint32_t>(length)), 1, {args});
      ExpectSame(Scores(length, 2, static_cast<uint32_t>(length)), 1, {args});
    }
  }
}

TEST_F(SelectionParity, LongRowsWithPlantedTies) {
  const int64_t length = kIsEmulated ? 9001 : 131071;
  for (const int levels : {0, 1, 3, 50}) {
    for (const int64_t budget : {int64_t{512}, length / 2}) {
      SelectArgs args;
      args.budget = budget;
      ExpectSame(Scores(2 * length, levels, 5), 2, {args});
    }
  }
}

// More positions than have their bits in shared memory together.
TEST_F(SelectionParity, RowsOfSeveralSlabs) {
  constexpr int64_t kLength = (1 << 17) + 4711;
  const std::vector<float> scores = Scores(kLength, 3, 21);
  const std::vector<Range> ranges = {{131000, 131100}};
  for (const int64_t budget : {int64_t{700}, kLength / 2, kLength - 1}) {
    SelectArgs args;
    args.budget = budget;
    args.protected_ranges = ranges;
    ExpectSame(scores, 1, {args});
  }
}

// Every digit decides once: keys that differ in the first, the second, the third one alone.
TEST_F(SelectionParity, CutsThatLieInEveryDigit) {
  const std::vector<Range> ranges = {{300, 390}, {1000, 1007}};
  for (const int shift : {21, 10, 0}) {
    std::vector<float> scores;
    std::mt19937 rng(9);
    for (int i = 0; i < 1500; ++i) {
      const uint32_t bits = 0x3f000000u + ((rng() % 300) << shift);
      scores.push_back(std::bit_cast<float>(shift == 21 ? bits & 0x7f7fffffu : bits));
    }
    SelectArgs args;
    SelectArgs with_protected;
    with_protected.protected_ranges = ranges;
    for (const int64_t budget : {1, 2, 100, 749, 1499}) {
      args.budget = budget;
      with_protected.budget = std::max<int64_t>(budget, 97);
      ExpectSame(scores, 1, {args});
      ExpectSame(scores, 1, {with_protected});
    }
  }
}

// The boundary digit is taken as a whole, and one less.
TEST_F(SelectionParity, CutsBetweenDigits) {
  std::vector<float> scores;
  for (int i = 0; i < 600; ++i)
    scores.push_back(i % 3 == 0 ? 8.0f + static_cast<float>(i % 7)
                                : 0.001f * static_cast<float>(i));
  SelectArgs args;
  for (const int64_t budget : {199, 200, 201}) {
    args.budget = budget;
    ExpectSame(scores, 1, {args});
  }
}

TEST_F(SelectionParity, AllScoresEqualKeepsTheLowest) {
  SelectArgs args;
  args.budget = 100;
  const std::vector<float> scores(777, 0.25f);
  const auto got = SelectOn(cuda_, scores, 1, {args});
  ASSERT_TRUE(got.ok()) << got.status();
  for (int32_t i = 0; i < 100; ++i) ASSERT_EQ((*got)[0].keep_indices[i], i);
}

TEST_F(SelectionParity, ThresholdAndLeastCount) {
  for (const float threshold : {-1.0f, 0.0f, 0.5f, 3.0f, 100.0f}) {
    for (const int64_t min_kept : {0, 1, 40, 5000}) {
      for (const int levels : {0, 2}) {
        SelectArgs args;
        args.budget = 60;
        args.threshold = threshold;
        args.min_kept = min_kept;
        ExpectSame(Scores(500, levels, 8), 1, {args});
      }
    }
  }
}

TEST_F(SelectionParity, ProtectedRanges) {
  const std::vector<Range> ranges = {{0, 4}, {31, 33}, {64, 64}, {90, 130}, {460, 500}};
  for (const int64_t budget : {86, 87, 150, 500, 600}) {
    for (const float threshold : {-std::numeric_limits<float>::infinity(), 0.4f, 9.0f}) {
      for (const int64_t min_kept : {0, 100}) {
        SelectArgs args;
        args.protected_ranges = ranges;
        args.budget = budget;
        args.threshold = threshold;
        args.min_kept = min_kept;
        ExpectSame(Scores(500, 3, 8), 1, {args});
      }
    }
  }
}

TEST_F(SelectionParity, EverythingProtected) {
  const std::vector<Range> ranges = {{0, 70}};
  SelectArgs args;
  args.protected_ranges = ranges;
  args.budget = 70;
  ExpectSame(Scores(70, 1, 8), 1, {args});
}

TEST_F(SelectionParity, ArgumentsPerRow) {
  const std::vector<Range> ranges = {{3, 50}};
  std::vector<SelectArgs> args(3);
  args[0].budget = 5;
  args[1].budget = 70;
  args[1].protected_ranges = ranges;
  args[2].budget = 300;
  args[2].threshold = 0.1f;
  ExpectSame(Scores(3 * 200, 4, 2), 3, args);
}

TEST_F(SelectionParity, SignedZerosAndInfinities) {
  std::vector<float> scores = Scores(300, 2, 4);
  scores[5] = -0.0f;
  scores[6] = 0.0f;
  scores[100] = std::numeric_limits<float>::infinity();
  scores[200] = -std::numeric_limits<float>::infinity();
  scores[299] = std::numeric_limits<float>::denorm_min();
  for (const int64_t budget : {1, 150, 299}) {
    SelectArgs args;
    args.budget = budget;
    args.threshold = 0.0f;
    ExpectSame(scores, 1, {args});
  }
}

TEST_F(SelectionParity, FirstNanIsNamed) {
  std::vector<float> scores = Scores(600, 0, 4);
  scores[300 + 299] = std::numeric_limits<float>::quiet_NaN();
  scores[300 + 41] = -std::numeric_limits<float>::quiet_NaN();
  SelectArgs args;
  args.budget = 10;
  ExpectSame(scores, 2, {args});
}

// Buffers of several lengths and row counts in one launch.
TEST_F(SelectionParity, EachTaskIsCutAsAlone) {
  const std::vector<Range> ranges = {{3, 50}};
  std::vector<SelectArgs> args(3);
  args[0].budget = 5;
  args[1].budget = 70;
  args[1].protected_ranges = ranges;
  args[2].budget = 300;
  args[2].threshold = 0.1f;
  const std::vector<float> first = Scores(3 * 200, 4, 2);
  const std::vector<float> second = Scores(2 * 700, 3, 3);
  const auto select = [&](const Machine& machine) {
    const std::unique_ptr<ScoreBuffer> a = machine.Buffer(3, 200, first);
    const std::unique_ptr<ScoreBuffer> b = machine.Buffer(2, 700, second);
    machine.PoisonKeptMemory();
    const std::vector<SelectTask> tasks = {
        {a.get(), args}, {b.get(), absl::MakeConstSpan(&args[1], 1)}, {b.get(), {&args[1], 2}}};
    auto selections = machine.backend->SelectEach(*machine.context, tasks);
    EXPECT_TRUE(selections.ok()) << selections.status();
    return *std::move(selections);
  };
  const auto got = select(cuda_);
  const auto want = select(cpu_);
  ASSERT_EQ(got.size(), want.size());
  for (size_t task = 0; task < want.size(); ++task) {
    ASSERT_EQ(got[task].size(), want[task].size());
    for (size_t row = 0; row < want[task].size(); ++row) {
      EXPECT_EQ(got[task][row].keep_indices, want[task][row].keep_indices) << task << " " << row;
      EXPECT_EQ(got[task][row].candidates, want[task][row].candidates) << task << " " << row;
      EXPECT_EQ(got[task][row].filled, want[task][row].filled) << task << " " << row;
    }
  }
}

TEST_F(SelectionParity, ANanOfOneTaskIsNamedByItsRow) {
  std::vector<float> scores = Scores(600, 0, 4);
  scores[300 + 41] = std::numeric_limits<float>::quiet_NaN();
  SelectArgs args;
  args.budget = 10;
  const auto select = [&](const Machine& machine) {
    const std::unique_ptr<ScoreBuffer> good = machine.Buffer(1, 600, Scores(600, 0, 5));
    const std::unique_ptr<ScoreBuffer> bad = machine.Buffer(2, 300, scores);
    const std::vector<SelectTask> tasks = {{good.get(), absl::MakeConstSpan(&args, 1)},
                                           {bad.get(), absl::MakeConstSpan(&args, 1)}};
    return machine.backend->SelectEach(*machine.context, tasks).status();
  };
  EXPECT_EQ(select(cuda_), select(cpu_));
  EXPECT_EQ(select(cuda_).message(), "select: row 1 position 41 is NaN, want a number");
}

TEST_F(SelectionParity, RefusesWhatTheCpuRefuses) {
  const std::vector<Range> ranges = {{0, 20}};
  SelectArgs too_small;
  too_small.budget = 10;
  too_small.protected_ranges = ranges;
  ExpectSame(Scores(100, 0, 1), 1, {too_small});
  SelectArgs negative;
  negative.budget = -1;
  ExpectSame(Scores(100, 0, 1), 1, {negative});
  ExpectSame(Scores(100, 0, 1), 2, {negative, negative, negative});
}

}  // namespace
}  // namespace keepset::kernels
