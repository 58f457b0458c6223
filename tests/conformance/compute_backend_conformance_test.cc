// What every listed backend promises (kernels/compute_backend.h): each op gives what its CPU twin
// gives, scores within a tolerance, selections and gathered rows bit for bit. A new line in
// backends.def is covered without a change here; one without its device on this host is skipped.
#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "kernels/compute_backend.h"
#include "tests/fakes/synthetic_prompt.h"

namespace keepset::kernels {
namespace {

// Other summation orders in fp32 over at most a few thousand terms.
constexpr double kTolerance = 1e-5;
constexpr int64_t kRows = 4;
constexpr int64_t kCols = 1003;

// A backend with one context of it.
class Machine {
 public:
  explicit Machine(std::unique_ptr<ComputeBackend> backend)
      : backend_(std::move(backend)), context_(*backend_->NewContext()) {}

  ComputeBackend& backend() const { return *backend_; }
  OpContext& context() const { return *context_; }
  std::unique_ptr<ScoreBuffer> Empty(int64_t rows, int64_t cols) const {
    return *backend_->NewBuffer(rows, cols);
  }
  std::unique_ptr<ScoreBuffer> Holding(int64_t rows, int64_t cols,
                                       const std::vector<float>& values) const {
    std::unique_ptr<ScoreBuffer> x = Empty(rows, cols);
    EXPECT_TRUE(backend_->CopyFromHost(*context_, values, *x).ok());
    return x;
  }
  std::vector<float> Read(const ScoreBuffer& x) const {
    std::vector<float> values(x.rows() * x.cols());
    const absl::Status status = backend_->CopyToHost(*context_, x, absl::MakeSpan(values));
    EXPECT_TRUE(status.ok()) << status;
    return values;
  }

 private:
  std::unique_ptr<ComputeBackend> backend_;
  std::unique_ptr<OpContext> context_;
};

std::vector<float> RandomScores(uint32_t seed, int64_t count = kRows * kCols) {
  std::mt19937 rng(seed);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(rng() >> 8) * 0x1p-24f + 0.01f;
  return values;
}

class ComputeBackendConformance : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    auto backend = NewBackend(GetParam(), {.num_threads = 3});
    if (absl::IsFailedPrecondition(backend.status())) GTEST_SKIP() << backend.status();
    ASSERT_TRUE(backend.ok()) << backend.status();
    machine_ = std::make_unique<Machine>(*std::move(backend));
    twin_ = std::make_unique<Machine>(*NewBackend("cpu", {.num_threads = 1}));
  }

  // `op` makes or changes `x`, which holds random scores of [rows, cols].
  using Op = std::function<absl::Status(const Machine& machine, ScoreBuffer& x)>;
  void ExpectTwins(int64_t rows, int64_t cols, const Op& op) {
    std::vector<std::vector<float>> results;
    for (const Machine* machine : {machine_.get(), twin_.get()}) {
      const auto x = machine->Holding(rows, cols, RandomScores(7, rows * cols));
      const absl::Status queued = op(*machine, *x);
      ASSERT_TRUE(queued.ok()) << queued;
      const absl::Status done = machine->backend().Wait(machine->context());
      ASSERT_TRUE(done.ok()) << done;
      results.push_back(machine->Read(*x));
    }
    for (size_t i = 0; i < results[1].size(); ++i) {
      ASSERT_NEAR(results[0][i], results[1][i], kTolerance * (1.0 + std::fabs(results[1][i])))
          << "element " << i;
    }
  }

  WindowArgs Window(RowReduction reduction) const {
    const engine::LayerObservation layer = prompt_.observation(0);
    WindowArgs args;
    args.q = layer.q_window;
    args.k = layer.k;
    args.row_positions = row_positions_;
    args.softmax_scale = static_cast<float>(prompt_.softmax_scale());
    args.reduction = reduction;
    args.what = "layer 0";
    return args;
  }

  fakes::SyntheticPrompt prompt_{fakes::PromptShape{.layout = fakes::KvLayout::kPaged}};
  const std::vector<int64_t> row_positions_ = {88, 89, 90, 91, 92, 93, 94, 95};
  std::unique_ptr<Machine> machine_;
  std::unique_ptr<Machine> twin_;
};

TEST_P(ComputeBackendConformance, WindowColumns) {
  for (const RowReduction reduction :
       {RowReduction::kMean, RowReduction::kSum, RowReduction::kMax, RowReduction::kLast}) {
    ExpectTwins(4, 96, [&](const Machine& on, ScoreBuffer& x) {
      return on.backend().WindowColumns(on.context(), Window(reduction), x);
    });
  }
}

TEST_P(ComputeBackendConformance, WindowColumnsOfListedHeads) {
  const std::vector<HeadRows> heads = {{0, 0, 8, RowReduction::kMean},
                                       {3, 2, 4, RowReduction::kMax}};
  ExpectTwins(2, 96, [&](const Machine& on, ScoreBuffer& x) {
    WindowArgs args = Window(RowReduction::kMean);
    args.heads = heads;
    return on.backend().WindowColumns(on.context(), args, x);
  });
}

TEST_P(ComputeBackendConformance, TileColumns) {
  const std::vector<float> values = RandomScores(3, 4 * 8 * 96);
  ExpectTwins(4, 96, [&](const Machine& on, ScoreBuffer& x) {
    TileArgs args;
    args.tile = {.data = reinterpret_cast<const std::byte*>(values.data()),
                 .size_bytes = static_cast<int64_t>(values.size() * sizeof(float)),
                 .dtype = DType::kF32,
                 .num_qo_heads = 4,
                 .num_rows = 8,
                 .seq_len = 96,
                 .head_stride = 8 * 96,
                 .row_stride = 96};
    args.row_positions = row_positions_;
    args.what = "layer 0";
    return on.backend().TileColumns(on.context(), args, x);
  });
}

TEST_P(ComputeBackendConformance, RowNorms) {
  ExpectTwins(2, 96, [&](const Machine& on, ScoreBuffer& x) {
    return on.backend().RowNorms(on.context(), prompt_.observation(0).v, "layer 0: v", x);
  });
}

TEST_P(ComputeBackendConformance, KeyNovelty) {
  ExpectTwins(1, 96, [&](const Machine& on, ScoreBuffer& x) {
    return on.backend().KeyNovelty(on.context(), prompt_.observation(0).k, {1}, "layer 0: k", x);
  });
}

TEST_P(ComputeBackendConformance, NormalizeRows) {
  const std::vector<SelectArgs::Range> excluded = {{0, 4}, {500, 700}};
  for (const Normalization normalization :
       {Normalization::kMax, Normalization::kSum, Normalization::kStandardize}) {
    ExpectTwins(kRows, kCols, [&](const Machine& on, ScoreBuffer& x) {
      return on.backend().NormalizeRows(on.context(), normalization, excluded, x);
    });
  }
}

TEST_P(ComputeBackendConformance, DivideByRowMean) {
  ExpectTwins(kRows, kCols, [](const Machine& on, ScoreBuffer& x) {
    return on.backend().DivideByRowMean(on.context(), 1e-8f, x);
  });
}

TEST_P(ComputeBackendConformance, MergeRows) {
  const std::vector<float> weights = {1.0f, 0.8f, 1.5f, 1.1f};
  for (const Merge merge : {Merge::kMean, Merge::kMax, Merge::kSum}) {
    ExpectTwins(2, kCols, [&](const Machine& on, ScoreBuffer& x) {
      const auto in = on.Holding(kRows, kCols, RandomScores(5));
      const absl::Status queued = on.backend().MergeRows(on.context(), *in, merge, weights, x);
      return queued.ok() ? on.backend().Wait(on.context()) : queued;
    });
  }
}

TEST_P(ComputeBackendConformance, Accumulate) {
  for (const Merge merge : {Merge::kMean, Merge::kMax, Merge::kSum}) {
    ExpectTwins(kRows, kCols, [&](const Machine& on, ScoreBuffer& x) {
      const auto more = on.Holding(kRows, kCols, RandomScores(5));
      const absl::Status queued = on.backend().Accumulate(on.context(), *more, merge, 0.5f, x);
      return queued.ok() ? on.backend().Wait(on.context()) : queued;
    });
  }
}

TEST_P(ComputeBackendConformance, Multiply) {
  ExpectTwins(kRows, kCols, [](const Machine& on, ScoreBuffer& x) {
    const auto row = on.Holding(1, kCols, RandomScores(5, kCols));
    const absl::Status queued = on.backend().Multiply(on.context(), *row, 3.0f, x);
    return queued.ok() ? on.backend().Wait(on.context()) : queued;
  });
}

TEST_P(ComputeBackendConformance, PoolsDilatesAndFills) {
  for (const PoolKind kind : {PoolKind::kAverage, PoolKind::kMax}) {
    ExpectTwins(kRows, kCols, [&](const Machine& on, ScoreBuffer& x) {
      const absl::Status filled = on.backend().Fill(on.context(), 10, 30, 0.0f, x);
      const absl::Status pooled =
          filled.ok() ? on.backend().Pool(on.context(), kind, 5, kCols - 8, x) : filled;
      return pooled.ok() ? on.backend().DilateForward(on.context(), 3, x) : pooled;
    });
  }
}

TEST_P(ComputeBackendConformance, MassAndEntropy) {
  std::vector<ComputeBackend::Mass> masses;
  for (const Machine* on : {machine_.get(), twin_.get()}) {
    const auto x = on->Holding(kRows, kCols, RandomScores(7));
    const auto mass = on->backend().MassAndEntropy(on->context(), *x, 2);
    ASSERT_TRUE(mass.ok()) << mass.status();
    masses.push_back(*mass);
  }
  EXPECT_NEAR(masses[0].entropy, masses[1].entropy, kTolerance * masses[1].entropy);
  EXPECT_NEAR(masses[0].sum, masses[1].sum, kTolerance * masses[1].sum);
}

TEST_P(ComputeBackendConformance, SelectKeepsTheSamePositions) {
  std::vector<float> scores = RandomScores(7);
  for (float& score : scores) score = std::round(score * 16.0f) / 16.0f;  // many ties
  const std::vector<SelectArgs::Range> kept_always = {{0, 4}, {990, 1003}};
  SelectArgs args;
  args.protected_ranges = kept_always;
  args.threshold = 0.75f;
  args.min_kept = 20;
  for (const int64_t budget : {17, 100, 400, 1003}) {
    args.budget = budget;
    std::vector<std::vector<Selection>> results;
    for (const Machine* on : {machine_.get(), twin_.get()}) {
      const auto x = on->Holding(kRows, kCols, scores);
      auto selected = on->backend().Select(on->context(), *x, absl::MakeConstSpan(&args, 1));
      ASSERT_TRUE(selected.ok()) << selected.status();
      results.push_back(*std::move(selected));
    }
    for (int64_t row = 0; row < kRows; ++row) {
      EXPECT_EQ(results[0][row].keep_indices, results[1][row].keep_indices);
      EXPECT_EQ(results[0][row].candidates, results[1][row].candidates);
      EXPECT_EQ(results[0][row].filled, results[1][row].filled);
    }
  }
}

TEST_P(ComputeBackendConformance, GatherRowsCopiesBitForBit) {
  const KvView source = prompt_.observation(0).k;
  const std::vector<int32_t> positions = {0, 3, 17, 64, 95};
  const absl::Span<const int32_t> sets[] = {positions};
  std::vector<std::vector<float>> results;
  for (const Machine* on : {machine_.get(), twin_.get()}) {
    std::vector<float>& out = results.emplace_back(2 * positions.size() * source.head_dim);
    MutableKvView view;
    view.data = reinterpret_cast<std::byte*>(out.data());
    view.size_bytes = static_cast<int64_t>(out.size() * sizeof(float));
    view.dtype = source.dtype;
    view.num_kv_heads = 2;
    view.seq_len = static_cast<int64_t>(positions.size());
    view.head_dim = source.head_dim;
    view.token_stride = source.head_dim;
    view.head_stride = view.seq_len * source.head_dim;
    const absl::Status gathered = on->backend().GatherRows(on->context(), source, sets, view);
    ASSERT_TRUE(gathered.ok()) << gathered;
  }
  EXPECT_EQ(results[0], results[1]);
}

TEST_P(ComputeBackendConformance, CompactRowsMovesBitForBit) {
  const KvView source = prompt_.observation(0).k;
  const std::vector<int32_t> first = {0, 3, 17, 64, 95};
  const std::vector<int32_t> second = {1, 2};
  const absl::Span<const int32_t> sets[] = {first, second};
  std::vector<std::vector<std::byte>> results;
  for (const Machine* on : {machine_.get(), twin_.get()}) {
    std::vector<std::byte>& bytes =
        results.emplace_back(source.data, source.data + source.size_bytes);
    MutableKvView view;
    view.data = bytes.data();
    view.size_bytes = source.size_bytes;
    view.dtype = source.dtype;
    view.num_kv_heads = source.num_kv_heads;
    view.seq_len = source.seq_len;
    view.head_dim = source.head_dim;
    view.token_stride = source.token_stride;
    view.head_stride = source.head_stride;
    const absl::Status compacted = on->backend().CompactRows(on->context(), sets, view);
    ASSERT_TRUE(compacted.ok()) << compacted;
  }
  EXPECT_EQ(results[0], results[1]);
}

TEST_P(ComputeBackendConformance, AKeyThatIsNotFiniteIsNamedAndTheContextGoesOn) {
  prompt_.set_k(0, 1, 40, 3, std::nanf(""));
  const auto x = machine_->Empty(4, 96);
  absl::Status status =
      machine_->backend().WindowColumns(machine_->context(), Window(RowReduction::kMean), *x);
  if (status.ok()) status = machine_->backend().Wait(machine_->context());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("position 40"));
  prompt_.set_k(0, 1, 40, 3, 0.5f);
  status = machine_->backend().WindowColumns(machine_->context(), Window(RowReduction::kMean), *x);
  if (status.ok()) status = machine_->backend().Wait(machine_->context());
  EXPECT_TRUE(status.ok()) << status;
}

INSTANTIATE_TEST_SUITE_P(Backends, ComputeBackendConformance, ::testing::ValuesIn(ListBackends()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace keepset::kernels
