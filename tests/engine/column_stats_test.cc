// Column statistics instead of the rows they were added up from: the same keep sets. Runs on the
// CPU backend and, with KEEPSET_EMULATED_DEVICE, on the emulated device.
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/status_macros.h"
#include "engine/input_needs.h"
#include "engine/operation.h"
#include "engine/policies/policy_registry.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "tests/fakes/fake_clock.h"
#include "tests/fakes/synthetic_prompt.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCpuBackend(const BackendOptions& options);
absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

}  // namespace keepset::kernels

namespace keepset::engine {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<std::unique_ptr<kernels::ComputeBackend>> NewBackendUnderTest() {
#if defined(KEEPSET_EMULATED_DEVICE)
  return kernels::NewCudaBackend({});
#else
  return kernels::NewCpuBackend({});
#endif
}

std::vector<uint16_t> ToBFloat16(const std::vector<float>& values) {
  std::vector<uint16_t> bits;
  for (const float value : values) {
    bits.push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16));
  }
  return bits;
}

// Attention of every layer, as a tile and as its columns.
class ColumnStats : public ::testing::TestWithParam<std::string> {
 protected:
  ColumnStats() { Reset(8); }

  // Small multiples of 1/64: sums and, for a power of two rows, means are exact in every dtype.
  void Reset(int64_t num_rows) {
    fakes::PromptShape shape;
    shape.num_rows = num_rows;
    prompt_ = std::make_unique<fakes::SyntheticPrompt>(shape);
    tiles_.clear();
    sums_.clear();
    std::mt19937 random(5);
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
      std::vector<float> tile(shape.num_qo_heads * num_rows * shape.seq_len);
      std::vector<float> sum(shape.num_qo_heads * shape.seq_len);
      for (int64_t head = 0; head < shape.num_qo_heads; ++head) {
        for (int64_t row = 0; row < num_rows; ++row) {
          for (int64_t t = 0; t <= shape.seq_len - num_rows + row; ++t) {
            const float value = static_cast<float>(random() % 16) / 64.0f;
            tile[(head * num_rows + row) * shape.seq_len + t] = value;
            sum[head * shape.seq_len + t] += value;
          }
        }
      }
      tiles_.push_back(std::move(tile));
      sums_.push_back(std::move(sum));
    }
  }

  const fakes::PromptShape& shape() const { return prompt_->shape(); }

  OperationSpec Spec() const {
    OperationSpec spec = prompt_->spec();
    spec.policy = GetParam();
    spec.budget.kind = Budget::Kind::kTokens;
    spec.budget.tokens = 20;
    spec.table = fakes::MakeTableFor(spec.policy, prompt_->model());
    spec.ppl = 10.0;
    return spec;
  }

  LayerObservation Tile(int64_t layer) const {
    LayerObservation observation = prompt_->observation(layer);
    observation.q_window = {};
    kernels::TileView& tile = observation.attn_tile;
    tile.data = reinterpret_cast<const std::byte*>(tiles_[layer].data());
    tile.size_bytes = static_cast<int64_t>(tiles_[layer].size() * sizeof(float));
    tile.num_qo_heads = shape().num_qo_heads;
    tile.num_rows = shape().num_rows;
    tile.seq_len = shape().seq_len;
    tile.head_stride = shape().num_rows * shape().seq_len;
    tile.row_stride = shape().seq_len;
    return observation;
  }

  template <typename T>
  LayerObservation Columns(int64_t layer, const std::vector<T>& columns, kernels::DType dtype,
                           ColumnReduction reduction) const {
    LayerObservation observation = prompt_->observation(layer);
    observation.q_window = {};
    observation.column_stats = {reinterpret_cast<const std::byte*>(columns.data()),
                                static_cast<int64_t>(columns.size() * sizeof(T)),
                                dtype,
                                shape().num_qo_heads,
                                shape().seq_len,
                                shape().seq_len};
    observation.column_reduction = reduction;
    return observation;
  }
  LayerObservation Sums(int64_t layer) const {
    return Columns(layer, sums_[layer], kernels::DType::kF32, ColumnReduction::kSum);
  }

  absl::StatusOr<OperationResult> Run(const OperationSpec& spec,
                                      const std::function<LayerObservation(int64_t)>& observation) {
    KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<kernels::ComputeBackend> backend,
                             NewBackendUnderTest());
    KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<Operation> operation,
                             Operation::Begin(spec, *policies_, *backend, clock_));
    for (int64_t layer = 0; layer < shape().num_layers; ++layer) {
      KEEPSET_RETURN_IF_ERROR(operation->Observe(layer, observation(layer)));
    }
    KEEPSET_ASSIGN_OR_RETURN(const OperationResult* const result, operation->Finish());
    return *result;
  }

  void ExpectSameAsTile(const OperationSpec& spec,
                        const std::function<LayerObservation(int64_t)>& observation) {
    const auto by_tile = Run(spec, [this](int64_t layer) { return Tile(layer); });
    const auto by_columns = Run(spec, observation);
    ASSERT_TRUE(by_tile.ok()) << by_tile.status();
    ASSERT_TRUE(by_columns.ok()) << by_columns.status();
    EXPECT_EQ(by_columns->entropy, by_tile->entropy);
    for (size_t layer = 0; layer < by_tile->layers.size(); ++layer) {
      EXPECT_EQ(by_columns->layers[layer].keep_indices, by_tile->layers[layer].keep_indices);
      EXPECT_EQ(by_columns->layers[layer].candidates, by_tile->layers[layer].candidates);
    }
  }

  std::unique_ptr<fakes::SyntheticPrompt> prompt_;
  std::vector<std::vector<float>> tiles_;  // [L] of [H, W, T]
  std::vector<std::vector<float>> sums_;   // [L] of [H, T]
  std::unique_ptr<PolicyRegistry> policies_ = NewBuiltinPolicyRegistry();
  fakes::FakeClock clock_;
};

TEST_P(ColumnStats, SumsDecideLikeTheTile) {
  ExpectSameAsTile(Spec(), [this](int64_t layer) { return Sums(layer); });
}

TEST_P(ColumnStats, MeansDecideLikeTheTile) {
  std::vector<std::vector<float>> means = sums_;
  for (std::vector<float>& layer : means) {
    for (float& value : layer) value /= static_cast<float>(shape().num_rows);
  }
  ExpectSameAsTile(Spec(), [&](int64_t layer) {
    return Columns(layer, means[layer], kernels::DType::kF32, ColumnReduction::kMean);
  });
}

TEST_P(ColumnStats, SixteenBitSumsDecideLikeTheTile) {
  std::vector<std::vector<uint16_t>> bits;
  for (const std::vector<float>& layer : sums_) bits.push_back(ToBFloat16(layer));
  ExpectSameAsTile(Spec(), [&](int64_t layer) {
    return Columns(layer, bits[layer], kernels::DType::kBF16, ColumnReduction::kSum);
  });
}

TEST_P(ColumnStats, PositionsBehindTheLastRowAreNotRead) {
  OperationSpec spec = Spec();
  for (int64_t i = 0; i < shape().num_rows; ++i) spec.row_positions.push_back(60 + i);
  const int64_t last = spec.row_positions.back();
  for (int64_t layer = 0; layer < shape().num_layers; ++layer) {
    for (int64_t head = 0; head < shape().num_qo_heads; ++head) {
      float* const sum = sums_[layer].data() + head * shape().seq_len;
      for (int64_t t = 0; t < shape().seq_len; ++t) {
        sum[t] = t > last ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
        for (int64_t row = 0; row < shape().num_rows && t <= last; ++row) {
          if (t > spec.row_positions[row]) continue;
          sum[t] += tiles_[layer][(head * shape().num_rows + row) * shape().seq_len + t];
        }
      }
    }
  }
  ExpectSameAsTile(spec, [this](int64_t layer) { return Sums(layer); });
}

TEST_P(ColumnStats, BadValueNamesLayerHeadAndPosition) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -0.25f}) {
    Reset(8);
    sums_[1][2 * shape().seq_len + 17] = bad;
    const auto result = Run(Spec(), [this](int64_t layer) { return Sums(layer); });
    EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(result.status().message()),
                HasSubstr("layer 1: column_stats: head 2 position 17 is "));
  }
}

INSTANTIATE_TEST_SUITE_P(EveryPolicyOfRowSums, ColumnStats,
                         ::testing::Values("compilerkv", "snapkv"),
                         [](const auto& info) { return info.param; });

using ColumnStatsOfOneRow = ColumnStats;

TEST_P(ColumnStatsOfOneRow, AreTheRow) {
  Reset(1);
  ExpectSameAsTile(Spec(), [this](int64_t layer) { return Sums(layer); });
}

TEST_P(ColumnStatsOfOneRow, OfMoreRowsAreRefused) {
  const auto result = Run(Spec(), [this](int64_t layer) { return Sums(layer); });
  EXPECT_EQ(result.status(),
            absl::InvalidArgumentError(
                "layer 0: column_stats: of num_rows=8 rows, policy tova reads the last 1, want "
                "statistics of at most these, or q_window with k, or attn_tile"));
}

INSTANTIATE_TEST_SUITE_P(Tova, ColumnStatsOfOneRow, ::testing::Values("tova"));

using CompilerKvColumnStats = ColumnStats;

TEST_P(CompilerKvColumnStats, EveryAlphaScopeDecidesLikeTheTile) {
  OperationSpec spec = Spec();
  for (const char* const scope : {"global", "layer", "head"}) {
    spec.parameters = {{"alpha_scope", scope}};
    ExpectSameAsTile(spec, [this](int64_t layer) { return Sums(layer); });
  }
}

TEST_P(CompilerKvColumnStats, OfMoreRowsThanTheWindowAreRefused) {
  OperationSpec spec = Spec();
  spec.parameters = {{"window", "4"}};
  const auto result = Run(spec, [this](int64_t layer) { return Sums(layer); });
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(result.status().message()),
              HasSubstr("layer 0: column_stats: of num_rows=8 rows, policy compilerkv reads the "
                        "last 4, want"));
}

TEST_P(CompilerKvColumnStats, BesideAnotherObservationAreRefused) {
  const auto beside_queries = Run(Spec(), [this](int64_t layer) {
    LayerObservation observation = Sums(layer);
    observation.q_window = prompt_->observation(layer).q_window;
    return observation;
  });
  EXPECT_EQ(beside_queries.status(),
            absl::InvalidArgumentError("layer 0: column_stats: given beside q_window, want one"));
  const auto beside_tile = Run(Spec(), [this](int64_t layer) {
    LayerObservation observation = Sums(layer);
    observation.attn_tile = Tile(layer).attn_tile;
    return observation;
  });
  EXPECT_EQ(beside_tile.status(),
            absl::InvalidArgumentError("layer 0: column_stats: given beside attn_tile, want one"));
}

TEST_P(CompilerKvColumnStats, WrongShapeIsRefused) {
  const auto result = Run(Spec(), [this](int64_t layer) {
    LayerObservation observation = Sums(layer);
    observation.column_stats.num_qo_heads = 2;
    return observation;
  });
  EXPECT_EQ(result.status(),
            absl::InvalidArgumentError("layer 0: column_stats: num_qo_heads=2, want 4"));
}

TEST_P(CompilerKvColumnStats, LayersMayComeInDifferentForms) {
  ExpectSameAsTile(Spec(),
                   [this](int64_t layer) { return layer == 1 ? Tile(layer) : Sums(layer); });
}

INSTANTIATE_TEST_SUITE_P(CompilerKv, CompilerKvColumnStats, ::testing::Values("compilerkv"));

using ObservationHeadsColumnStats = ColumnStats;

TEST_P(ObservationHeadsColumnStats, AreRefusedNamingWhatIsRead) {
  const auto result = Run(Spec(), [this](int64_t layer) { return Sums(layer); });
  EXPECT_EQ(result.status(),
            absl::InvalidArgumentError(
                "layer 0: column_stats: policy observation_heads looks at rows one by one, want "
                "q_window with k, or attn_tile"));
}

INSTANTIATE_TEST_SUITE_P(ObservationHeads, ObservationHeadsColumnStats,
                         ::testing::Values("observation_heads"),
                         [](const auto& /*info*/) { return "heads"; });

}  // namespace
}  // namespace keepset::engine
