#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "kernels/compute_backend.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {
namespace {

using ::testing::HasSubstr;

// fp32 dot products of length d at |logit| < 20 carry a few 1e-6 into the exponent.
constexpr double kRelative = 5e-5;
constexpr double kAbsolute = 1e-8;

struct Shape {
  int64_t num_qo_heads = 4;
  int64_t num_kv_heads = 2;
  int64_t num_rows = 16;
  int64_t seq_len = 100;
  int64_t head_dim = 32;
  DType q_dtype = DType::kF32;
  DType k_dtype = DType::kF32;
  Layout layout = Layout::kHnd;
  uint32_t seed = 1;
};

struct Problem {
  explicit Problem(const Shape& shape)
      : rng(shape.seed),
        q(RandomValues(rng, shape.num_qo_heads * shape.num_rows * shape.head_dim, shape.q_dtype),
          shape.num_qo_heads, shape.num_rows, shape.head_dim, shape.q_dtype),
        k(RandomValues(rng, shape.num_kv_heads * shape.seq_len * shape.head_dim, shape.k_dtype),
          shape.num_kv_heads, shape.seq_len, shape.head_dim, shape.k_dtype, shape.layout),
        row_positions(LastPositions(shape.num_rows, shape.seq_len)),
        scale(1.0f / std::sqrt(static_cast<float>(shape.head_dim))) {}

  WindowArgs Args(RowReduction reduction = RowReduction::kMean) const {
    WindowArgs args;
    args.q = q.queries();
    args.k = k.view();
    args.row_positions = row_positions;
    args.softmax_scale = scale;
    args.reduction = reduction;
    args.what = "layer 3";
    return args;
  }

  std::vector<double> Expected(RowReduction reduction) const {
    return ReduceOracle(AttentionOracle(q, k, row_positions, scale).tile, q.queries().num_qo_heads,
                        q.queries().num_rows, k.view().seq_len, reduction);
  }

  std::mt19937 rng;
  DenseTensor q;
  KvTensor k;
  std::vector<int64_t> row_positions;
  float scale;
};

std::vector<float> Columns(const WindowArgs& args, int num_threads = 2) {
  BackendFixture fixture(num_threads);
  std::unique_ptr<ScoreBuffer> out = fixture.Buffer(args.q.num_qo_heads, args.k.seq_len);
  const absl::Status status = fixture.backend().WindowColumns(fixture.context(), args, *out);
  EXPECT_TRUE(status.ok()) << status;
  return fixture.Values(*out);
}

absl::Status ColumnsStatus(const WindowArgs& args) {
  BackendFixture fixture;
  std::unique_ptr<ScoreBuffer> out = fixture.Buffer(args.q.num_qo_heads, args.k.seq_len);
  return fixture.backend().WindowColumns(fixture.context(), args, *out);
}

void ExpectClose(const std::vector<float>& actual, const std::vector<double>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_NEAR(actual[i], expected[i], kRelative * expected[i] + kAbsolute) << "at " << i;
  }
}

void ExpectMatchesOracle(const Shape& shape, RowReduction reduction = RowReduction::kMean) {
  const Problem problem(shape);
  ExpectClose(Columns(problem.Args(reduction)), problem.Expected(reduction));
}

TEST(WindowColumns, MatchesOracleForEveryGroupSize) {
  for (int64_t group : {1, 2, 4, 8}) {
    Shape shape;
    shape.num_qo_heads = 2 * group;
    shape.seq_len = 500;
    ExpectMatchesOracle(shape);
  }
}

TEST(WindowColumns, MatchesOracleForEveryHeadDim) {
  for (int64_t head_dim : {1, 3, 32, 80, 96, 128, 192}) {
    Shape shape;
    shape.head_dim = head_dim;
    ExpectMatchesOracle(shape);
  }
}

TEST(WindowColumns, MatchesOracleForEveryPairOfTypes) {
  for (DType q : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (DType k : {DType::kF32, DType::kF16, DType::kBF16}) {
      Shape shape;
      shape.q_dtype = q;
      shape.k_dtype = k;
      shape.head_dim = 37;
      ExpectMatchesOracle(shape);
    }
  }
}

TEST(WindowColumns, MatchesOracleForEveryReduction) {
  for (RowReduction reduction :
       {RowReduction::kMean, RowReduction::kSum, RowReduction::kMax, RowReduction::kLast}) {
    Shape shape;
    shape.seq_len = 900;
    ExpectMatchesOracle(shape, reduction);
  }
}

TEST(WindowColumns, MatchesOracleAroundChunkAndVectorEdges) {
  for (int64_t seq_len : {1, 2, 15, 16, 17, 47, 48, 49, 383, 384, 385, 767, 769}) {
    Shape shape;
    shape.seq_len = seq_len;
    shape.num_rows = std::min<int64_t>(seq_len, 5);
    ExpectMatchesOracle(shape);
  }
}

TEST(WindowColumns, MatchesOracleForEveryRowCount) {
  for (int64_t num_rows : {1, 2, 3, 4, 5, 7, 8, 9, 17, 64}) {
    Shape shape;
    shape.num_rows = num_rows;
    ExpectMatchesOracle(shape);
  }
}

// Restricts the backend to one SIMD target while it lives.
class TargetScope {
 public:
  explicit TargetScope(int64_t target) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
  ~TargetScope() {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().DeInit();
  }
};

TEST(WindowColumns, EverySimdTargetMatchesTheOracle) {
  std::set<std::string> names;
  const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  for (int64_t target : targets) {
    const TargetScope scope(target);
    const std::string name = CpuBackend()->name();
    SCOPED_TRACE(name);
    EXPECT_TRUE(names.insert(name).second);
    for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      for (int64_t head_dim : {32, 45}) {
        Shape shape;
        shape.seq_len = 463;
        shape.num_rows = 11;
        shape.head_dim = head_dim;
        shape.q_dtype = dtype;
        shape.k_dtype = dtype;
        ExpectMatchesOracle(shape);
      }
    }
    Shape shape;
    shape.k_dtype = DType::kF16;
    Problem problem(shape);
    problem.k.Set(1, 5, 2, std::numeric_limits<float>::infinity());
    EXPECT_THAT(std::string(ColumnsStatus(problem.Args()).message()),
                HasSubstr("k: head 1 position 5 is not finite"));
  }
}

TEST(WindowColumns, LayoutDoesNotShowInTheBits) {
  Shape shape;
  shape.seq_len = 411;
  shape.k_dtype = DType::kBF16;
  const std::vector<float> hnd = Columns(Problem(shape).Args());
  shape.layout = Layout::kNhd;
  EXPECT_EQ(Columns(Problem(shape).Args()), hnd);
  shape.layout = Layout::kPaged;
  EXPECT_EQ(Columns(Problem(shape).Args()), hnd);
}

TEST(WindowColumns, RowsMayObserveFromAnyAscendingPositions) {
  Shape shape;
  shape.num_rows = 5;
  shape.seq_len = 800;
  Problem problem(shape);
  problem.row_positions = {0, 13, 383, 384, 700};
  const std::vector<float> columns = Columns(problem.Args());
  ExpectClose(columns, problem.Expected(RowReduction::kMean));
  EXPECT_EQ(columns[701], 0.0f);
}

TEST(WindowColumns, RowsSumToOne) {
  Shape shape;
  shape.seq_len = 3000;
  const std::vector<float> columns = Columns(Problem(shape).Args());
  for (int64_t h = 0; h < shape.num_qo_heads; ++h) {
    double sum = 0.0;
    for (int64_t t = 0; t < shape.seq_len; ++t) sum += columns[h * shape.seq_len + t];
    EXPECT_NEAR(sum, 1.0, 1e-5);
  }
}

TEST(WindowColumns, ThreadCountDoesNotShowInTheBits) {
  Shape shape;
  shape.num_qo_heads = 8;
  shape.seq_len = 2500;
  const Problem problem(shape);
  const std::vector<float> one = Columns(problem.Args(), 1);
  EXPECT_EQ(Columns(problem.Args(), 2), one);
  EXPECT_EQ(Columns(problem.Args(), 8), one);
}

TEST(WindowColumns, ContextGivesTheSameBitsWhenUsedAgain) {
  Shape shape;
  shape.seq_len = 1200;
  const Problem large(shape);
  shape.seq_len = 90;
  const Problem small(shape);
  BackendFixture fixture;
  const auto run = [&](const Problem& problem) {
    const WindowArgs args = problem.Args();
    std::unique_ptr<ScoreBuffer> out = fixture.Buffer(args.q.num_qo_heads, args.k.seq_len);
    EXPECT_TRUE(fixture.backend().WindowColumns(fixture.context(), args, *out).ok());
    return fixture.Values(*out);
  };
  const std::vector<float> first = run(small);
  run(large);
  EXPECT_EQ(run(small), first);
}

TEST(WindowColumns, PermutedHeadsPermuteTheRows) {
  Shape shape;
  const Problem problem(shape);
  const std::vector<float> columns = Columns(problem.Args());
  Problem swapped(shape);
  for (int64_t i = 0; i < shape.num_rows; ++i) {
    for (int64_t c = 0; c < shape.head_dim; ++c) {
      swapped.q.Set(0, i, c, problem.q.At(1, i, c));
      swapped.q.Set(1, i, c, problem.q.At(0, i, c));
    }
  }
  const std::vector<float> other = Columns(swapped.Args());
  for (int64_t t = 0; t < shape.seq_len; ++t) {
    EXPECT_EQ(other[t], columns[shape.seq_len + t]);
    EXPECT_EQ(other[shape.seq_len + t], columns[t]);
  }
}

TEST(WindowColumns, ConstantAddedToEveryLogitChangesNothing) {
  Shape shape;
  shape.seq_len = 600;
  Problem problem(shape);
  // One channel of K is constant, so its query element shifts all logits of the row.
  for (int64_t g = 0; g < shape.num_kv_heads; ++g) {
    for (int64_t t = 0; t < shape.seq_len; ++t) problem.k.Set(g, t, 0, 1.0f);
  }
  const std::vector<double> expected = problem.Expected(RowReduction::kMean);
  for (int64_t h = 0; h < shape.num_qo_heads; ++h) {
    for (int64_t i = 0; i < shape.num_rows; ++i) problem.q.Set(h, i, 0, 300.0f);
  }
  ExpectClose(Columns(problem.Args()), expected);
}

TEST(WindowColumns, ManyRowsOfALongPromptAreTakenInBlocks) {
  // 1200 rows x 65536 tokens are 300 MiB of exponentials: two blocks of rows.
  Shape shape;
  shape.num_qo_heads = shape.num_kv_heads = 1;
  shape.num_rows = 1200;
  shape.seq_len = 65536;
  shape.head_dim = 1;
  const Problem problem(shape);
  for (const RowReduction reduction :
       {RowReduction::kMean, RowReduction::kSum, RowReduction::kMax}) {
    const WindowArgs whole = problem.Args(reduction);
    const std::vector<float> columns = Columns(whole);
    const auto half = [&](int64_t first) {
      WindowArgs args = whole;
      args.q.num_rows = 600;
      args.q.data += first * args.q.row_stride * DTypeBytes(args.q.dtype);
      args.q.size_bytes -= first * args.q.row_stride * DTypeBytes(args.q.dtype);
      args.row_positions = args.row_positions.subspan(first, 600);
      return Columns(args);
    };
    const std::vector<float> early = half(0);
    const std::vector<float> late = half(600);
    for (size_t t = 0; t < columns.size(); ++t) {
      float want = early[t] + late[t];
      if (reduction == RowReduction::kMean) want /= 2.0f;
      if (reduction == RowReduction::kMax) want = std::max(early[t], late[t]);
      ASSERT_NEAR(columns[t], want, kRelative * want) << t;
    }
  }
}

TEST(WindowColumns, GivenLogSumExpGivesTheComputedColumns) {
  for (RowReduction reduction :
       {RowReduction::kMean, RowReduction::kSum, RowReduction::kMax, RowReduction::kLast}) {
    Shape shape;
    shape.seq_len = 777;
    const Problem problem(shape);
    const Attention attention =
        AttentionOracle(problem.q, problem.k, problem.row_positions, problem.scale);
    const DenseTensor lse(std::vector<float>(attention.lse.begin(), attention.lse.end()),
                          shape.num_qo_heads, shape.num_rows, 1, DType::kF32);
    WindowArgs args = problem.Args(reduction);
    args.window_lse = lse.lse();
    ExpectClose(Columns(args), problem.Expected(reduction));
  }
}

TEST(WindowColumns, GivenLogSumExpMayBeToBaseTwo) {
  const Problem problem{Shape()};
  std::vector<float> values;
  for (const double natural :
       AttentionOracle(problem.q, problem.k, problem.row_positions, problem.scale).lse) {
    values.push_back(static_cast<float>(natural / std::log(2.0)));
  }
  const DenseTensor lse(values, Shape().num_qo_heads, Shape().num_rows, 1, DType::kF32);
  WindowArgs args = problem.Args(RowReduction::kMean);
  args.window_lse = lse.lse();
  args.window_lse.base = LogBase::kTwo;
  ExpectClose(Columns(args), problem.Expected(RowReduction::kMean));
}

TEST(WindowColumns, PeakedRowKeepsItsMassWithoutOverflow) {
  Shape shape;
  shape.seq_len = 1000;
  Problem problem(shape);
  for (int64_t c = 0; c < shape.head_dim; ++c) {
    problem.k.Set(0, 40, c, 1000.0f * problem.q.At(0, 0, c));
  }
  const std::vector<float> columns = Columns(problem.Args(RowReduction::kMax));
  EXPECT_FLOAT_EQ(columns[40], 1.0f);
  for (float value : columns) EXPECT_TRUE(std::isfinite(value));
}

TEST(WindowColumns, NonFiniteKeyNamesHeadAndPosition) {
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      Shape shape;
      shape.seq_len = 900;
      shape.k_dtype = dtype;
      Problem problem(shape);
      problem.k.Set(1, 517, 31, bad);
      const absl::Status status = ColumnsStatus(problem.Args());
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(std::string(status.message()),
                  HasSubstr("layer 3: k: head 1 position 517 is not finite"));
    }
  }
}

TEST(WindowColumns, FirstOfSeveralBadKeysIsReported) {
  Shape shape;
  shape.seq_len = 2000;
  Problem problem(shape);
  problem.k.Set(0, 1900, 3, std::numeric_limits<float>::quiet_NaN());
  problem.k.Set(0, 450, 3, std::numeric_limits<float>::quiet_NaN());
  EXPECT_THAT(std::string(ColumnsStatus(problem.Args()).message()),
              HasSubstr("head 0 position 450 "));
}

TEST(WindowColumns, NonFiniteQueryNamesHeadAndRow) {
  Shape shape;
  Problem problem(shape);
  problem.q.Set(2, 7, 11, std::numeric_limits<float>::quiet_NaN());
  const absl::Status status = ColumnsStatus(problem.Args());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer 3: q: head 2 row 7"));
}

TEST(WindowColumns, OverflowingLogitNamesHeadRowAndPosition) {
  Shape shape;
  Problem problem(shape);
  for (int64_t c = 0; c < shape.head_dim; ++c) {
    problem.q.Set(3, 5, c, 1e20f);
    problem.k.Set(1, 33, c, -1e20f);
  }
  const absl::Status status = ColumnsStatus(problem.Args());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("layer 3: logits: head 3 row 5 position 33"));
}

TEST(WindowColumns, NonFiniteLogSumExpIsRefused) {
  Shape shape;
  const Problem problem(shape);
  DenseTensor lse(std::vector<float>(shape.num_qo_heads * shape.num_rows, 5.0f), shape.num_qo_heads,
                  shape.num_rows, 1, DType::kF32);
  lse.Set(1, 4, 0, std::numeric_limits<float>::infinity());
  WindowArgs args = problem.Args();
  args.window_lse = lse.lse();
  const absl::Status status = ColumnsStatus(args);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("window_lse: head 1 row 4"));
}

TEST(WindowColumns, LogSumExpFarBelowTheLogitsIsRefused) {
  Shape shape;
  const Problem problem(shape);
  const DenseTensor lse(std::vector<float>(shape.num_qo_heads * shape.num_rows, -500.0f),
                        shape.num_qo_heads, shape.num_rows, 1, DType::kF32);
  WindowArgs args = problem.Args();
  args.window_lse = lse.lse();
  EXPECT_EQ(ColumnsStatus(args).code(), absl::StatusCode::kInvalidArgument);
}

TEST(WindowColumns, NegativeRowPositionsAreRefused) {
  Shape shape;
  Problem problem(shape);
  problem.row_positions.front() = -1;
  EXPECT_EQ(ColumnsStatus(problem.Args()).code(), absl::StatusCode::kInvalidArgument);
}

TEST(WindowColumns, RepeatedRowPositionIsRefused) {
  Shape shape;
  Problem problem(shape);
  problem.row_positions[3] = problem.row_positions[2];
  EXPECT_EQ(ColumnsStatus(problem.Args()).code(), absl::StatusCode::kInvalidArgument);
}

TEST(WindowColumns, HeadsThatDoNotGroupAreRefused) {
  Shape shape;
  shape.num_qo_heads = 3;
  const Problem problem(shape);
  EXPECT_EQ(ColumnsStatus(problem.Args()).code(), absl::StatusCode::kInvalidArgument);
}

TEST(WindowColumns, QueriesWithoutSomeHeadsGiveTheSameBits) {
  Problem problem({.num_qo_heads = 8, .num_kv_heads = 2});
  const std::vector<HeadRows> of_all = {{1, 0, 16, RowReduction::kMax},
                                        {1, 4, 9, RowReduction::kMean},
                                        {5, 2, 3, RowReduction::kSum},
                                        {7, 0, 16, RowReduction::kLast}};
  // Heads 1, 5 and 7 alone.
  const QueryView all = problem.q.queries();
  std::vector<std::byte> bytes;
  for (const int64_t head : {1, 5, 7}) {
    const std::byte* const from = all.data + head * all.head_stride * 4;
    bytes.insert(bytes.end(), from, from + int64_t{16} * 32 * 4);
  }
  const std::vector<HeadRows> of_some = {{0, 0, 16, RowReduction::kMax, 0},
                                         {0, 4, 9, RowReduction::kMean, 0},
                                         {1, 2, 3, RowReduction::kSum, 1},
                                         {2, 0, 16, RowReduction::kLast, 1}};
  WindowArgs whole = problem.Args();
  whole.heads = of_all;
  WindowArgs part = problem.Args();
  part.q.data = bytes.data();
  part.q.size_bytes = static_cast<int64_t>(bytes.size());
  part.q.num_qo_heads = 3;
  part.q.head_stride = int64_t{16} * 32;
  part.q.row_stride = 32;
  part.heads = of_some;
  BackendFixture fixture(2);
  const std::unique_ptr<ScoreBuffer> wanted = fixture.Buffer(4, 100);
  const std::unique_ptr<ScoreBuffer> found = fixture.Buffer(4, 100);
  ASSERT_TRUE(fixture.backend().WindowColumns(fixture.context(), whole, *wanted).ok());
  ASSERT_TRUE(fixture.backend().WindowColumns(fixture.context(), part, *found).ok());
  EXPECT_EQ(fixture.Values(*found), fixture.Values(*wanted));

  const std::vector<HeadRows> unordered = {{0, 0, 16, RowReduction::kMax, 1},
                                           {1, 0, 16, RowReduction::kMax, 0}};
  part.heads = unordered;
  EXPECT_THAT(
      fixture.backend().WindowColumns(fixture.context(), part, *fixture.Buffer(2, 100)).message(),
      HasSubstr("layer 3: heads[1]: kv_head 0, want 1..1"));
}

}  // namespace
}  // namespace keepset::kernels
