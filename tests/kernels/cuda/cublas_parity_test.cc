// Window scores with products by cuBLAS: every type, head dimension, layout and reduction against
// plain fp64 loops, and the faults of the other kernels.
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/compute_backend.h"
#include "tests/kernels/cuda/cublas_fixture.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {
namespace {

using ::testing::HasSubstr;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST_F(CublasParity, EveryTypeAndLayout) {
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const Layout layout : {Layout::kNhd, Layout::kHnd, Layout::kPaged}) {
      ExpectNearOracle({.dtype = dtype, .layout = layout});
    }
  }
}

TEST_F(CublasParity, EveryTypeWithGivenLogSumExp) {
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const LogBase base : {LogBase::kE, LogBase::kTwo}) {
      ExpectNearOracle({.dtype = dtype, .reference = Reference::kGiven, .lse_base = base});
    }
  }
}

TEST_F(CublasParity, HeadDimensionsOfEveryKind) {
  for (const int64_t head_dim : {1, 7, 37, 72, 80, 96, 192, 256, 1000}) {
    for (const Layout layout : {Layout::kNhd, Layout::kPaged}) {
      ExpectNearOracle({.num_kv_heads = 2,
                        .num_rows = 3,
                        .seq_len = 41,
                        .head_dim = head_dim,
                        .layout = layout,
                        .gap = 3});
    }
  }
}

TEST_F(CublasParity, EveryReduction) {
  for (const RowReduction reduction :
       {RowReduction::kMean, RowReduction::kSum, RowReduction::kMax, RowReduction::kLast}) {
    ExpectNearOracle({.reduction = reduction});
    ExpectNearOracle({.reduction = reduction, .reference = Reference::kGiven});
  }
}

TEST_F(CublasParity, MoreTokensThanABlockTakes) {
  ExpectNearOracle({.num_rows = 19, .seq_len = 301, .head_dim = 16});
}

TEST_F(CublasParity, RowsInTheMiddleOfThePrompt) {
  ExpectNearOracle({.num_rows = 3, .row_positions = {0, 33, 70}});
}

TEST_F(CublasParity, OneTokenAndOneRow) { ExpectNearOracle({.num_rows = 1, .seq_len = 1}); }

TEST_F(CublasParity, TensorsInHostMemory) {
  ExpectNearOracle({.layout = Layout::kPaged, .gap = 3, .memory = Memory::kHost});
}

// 2048 rows in one piece of 2048 tokens and another one of 101.
TEST_F(CublasParity, TokensOfSeveralPieces) {
  ExpectNearOracle({.num_kv_heads = 2,
                    .group = 16,
                    .num_rows = 64,
                    .seq_len = 2149,
                    .head_dim = 8,
                    .layout = Layout::kPaged});
}

// 9010 rows of a KV head: 8192 of them and the rest, and tokens of two pieces.
TEST_F(CublasParity, RowsOfSeveralPieces) {
  ExpectNearOracle(
      {.num_kv_heads = 1, .group = 17, .num_rows = 530, .seq_len = 530, .head_dim = 8});
}

// Copied keys of two KV heads make a piece.
TEST_F(CublasParity, KvHeadsOfSeveralPieces) {
  ExpectNearOracle({.num_kv_heads = 5,
                    .num_rows = 2,
                    .seq_len = 20,
                    .head_dim = 4096,
                    .dtype = DType::kF32,
                    .layout = Layout::kPaged});
}

// Two heads of one KV head, of which one is listed twice, and one of another KV head.
WindowCaseOf<77, 32, 8> ListedHeads() {
  return {.num_kv_heads = 3,
          .group = 3,
          .num_rows = 70,
          .head_dim = 16,
          .heads = {{1, 0, 70, RowReduction::kMean},
                    {1, 4, 3, RowReduction::kMax},
                    {2, 0, 70, RowReduction::kLast},
                    {6, 2, 66, RowReduction::kSum}}};
}

TEST_F(CublasParity, ListedHeads) {
  for (const Layout layout : {Layout::kNhd, Layout::kPaged}) {
    for (const Reference reference : {Reference::kComputed, Reference::kGiven}) {
      Shape shape = ListedHeads();
      shape.layout = layout;
      shape.reference = reference;
      ExpectNearOracle(shape);
    }
  }
}

TEST_F(CublasParity, KeysOfKvHeadsThatAreNotListedAreNotRead) {
  const Shape shape = ListedHeads();
  WindowTensors tensors = RandomWindow(shape, 4);
  tensors.k.Set(1, 5, 0, kNan);
  EXPECT_TRUE(Columns(shape, tensors).ok());
  tensors.k.Set(2, 5, 0, kNan);
  EXPECT_EQ(Columns(shape, tensors).status().message(),
            "layer 3: k: head 2 position 5 is not finite");
}

TEST_F(CublasParity, ValueNormsComeAlong) {
  ExpectValueNorms({.layout = Layout::kPaged});
  ExpectValueNorms({.seq_len = 301, .head_dim = 7, .dtype = DType::kF32, .gap = 3});
  ExpectValueNorms(ListedHeads());
}

TEST_F(CublasParity, QueriesOfAnotherTypeThanKeys) {
  const Shape shape = {.num_rows = 6};
  const Shape wide = {.num_rows = 6, .dtype = DType::kF32};
  // Values that bf16 holds exactly.
  WindowTensors tensors = RandomWindow(shape, 8);
  std::vector<float> queries;
  for (int64_t head = 0; head < shape.num_qo_heads(); ++head) {
    for (int64_t row = 0; row < shape.num_rows; ++row) {
      for (int64_t c = 0; c < shape.head_dim; ++c) queries.push_back(tensors.q.At(head, row, c));
    }
  }
  tensors.q =
      DenseTensor(queries, shape.num_qo_heads(), shape.num_rows, shape.head_dim, DType::kF32);
  const absl::StatusOr<std::vector<float>> columns = Columns(wide, tensors);
  ASSERT_TRUE(columns.ok()) << columns.status();
  ExpectNear(*columns, shape, AttentionOf(tensors));
}

TEST_F(CublasParity, SameInputsSameBits) {
  const Shape shape = {.num_rows = 20, .seq_len = 600, .head_dim = 16};
  const WindowTensors tensors = RandomWindow(shape, 3);
  const absl::StatusOr<std::vector<float>> first = Columns(shape, tensors);
  const absl::StatusOr<std::vector<float>> second = Columns(shape, tensors);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(*first, *second);
}

TEST_F(CublasParity, LayersTogetherHaveTheBitsOfLayersAlone) {
  const Shape shape = {.num_rows = 7, .seq_len = 90, .layout = Layout::kPaged};
  std::vector<WindowTensors> tensors;
  std::vector<std::unique_ptr<ScoreBuffer>> buffers;
  std::vector<WindowArgs> layers;
  std::vector<ScoreBuffer*> outs;
  for (uint32_t layer = 0; layer < 4; ++layer) tensors.push_back(RandomWindow(shape, 30 + layer));
  for (size_t layer = 0; layer < tensors.size(); ++layer) {
    buffers.push_back(cuda_.Buffer(4, shape.seq_len));
    outs.push_back(buffers.back().get());
    WindowArgs args;
    args.q = tensors[layer].q.queries();
    args.k = tensors[layer].k.view();
    args.row_positions = tensors[layer].row_positions;
    args.softmax_scale = tensors[layer].scale;
    args.what = "layer";
    layers.push_back(args);
  }
  const absl::Status status = cuda_.backend->WindowColumnsOfLayers(*cuda_.context, layers, outs);
  ASSERT_TRUE(status.ok()) << status;
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const std::unique_ptr<ScoreBuffer> alone = cuda_.Buffer(4, shape.seq_len);
    ASSERT_TRUE(cuda_.backend->WindowColumns(*cuda_.context, layers[layer], *alone).ok());
    EXPECT_EQ(cuda_.Values(*outs[layer]), cuda_.Values(*alone)) << "layer " << layer;
  }
}

TEST_F(CublasParity, NanInKeyNamesHeadAndPosition) {
  for (const Layout layout : {Layout::kNhd, Layout::kPaged}) {
    const Shape shape = {.layout = layout};
    WindowTensors tensors = RandomWindow(shape, 2);
    tensors.k.Set(1, 40, 31, kNan);
    const absl::Status status = Columns(shape, tensors).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), "layer 3: k: head 1 position 40 is not finite");
  }
}

TEST_F(CublasParity, InfinityInKeyThatNoRowSeesIsRefused) {
  const Shape shape = {.num_rows = 1, .row_positions = {10}};
  WindowTensors tensors = RandomWindow(shape, 2);
  tensors.k.Set(0, 76, 0, std::numeric_limits<float>::infinity());
  EXPECT_EQ(Columns(shape, tensors).status().message(),
            "layer 3: k: head 0 position 76 is not finite");
}

TEST_F(CublasParity, NanInQueryNamesHeadAndRow) {
  const Shape shape;
  WindowTensors tensors = RandomWindow(shape, 2);
  tensors.q.Set(3, 4, 0, kNan);
  EXPECT_EQ(Columns(shape, tensors).status().message(), "layer 3: q: head 3 row 4 is not finite");
}

TEST_F(CublasParity, NanInValuesNamesHeadAndPosition) {
  const Shape shape;
  WindowTensors tensors = RandomWindow(shape, 2);
  tensors.v.Set(1, 76, 3, kNan);
  std::vector<float> norms;
  EXPECT_EQ(Columns(shape, tensors, nullptr, &norms).status().message(),
            "layer 3: v: head 1 position 76 is not finite");
}

TEST_F(CublasParity, OverflowingLogitIsRefused) {
  const Shape shape = {.dtype = DType::kF32};
  WindowTensors tensors = RandomWindow(shape, 2);
  tensors.q.Set(0, 0, 0, 1e30f);
  tensors.k.Set(0, 5, 0, 1e30f);
  const absl::Status status = Columns(shape, tensors).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("logits: head 0 row 0 position 5"));
}

TEST_F(CublasParity, LogSumExpFarBelowTheLogitsIsRefused) {
  const Shape shape = {.reference = Reference::kGiven};
  const WindowTensors tensors = RandomWindow(shape, 2);
  std::vector<float> values(static_cast<size_t>(shape.num_qo_heads() * shape.num_rows), 10.0f);
  values[7] = -500.0f;
  const DenseTensor lse(values, shape.num_qo_heads(), shape.num_rows, 1, DType::kF32);
  EXPECT_THAT(std::string(Columns(shape, tensors, &lse).status().message()),
              HasSubstr("window_lse: head 1 row 2 lies far below"));
}

TEST_F(CublasParity, RefusedLayerLeavesTheContextUsable) {
  const Shape shape;
  WindowTensors tensors = RandomWindow(shape, 2);
  tensors.k.Set(1, 40, 31, kNan);
  EXPECT_FALSE(Columns(shape, tensors).ok());
  ExpectNearOracle(shape);
}

TEST_F(CublasParity, LargeShapes) {
  if (kIsEmulated) GTEST_SKIP() << "takes minutes on the emulator";
  for (const int64_t head_dim : {80, 96, 128, 192, 256}) {
    for (const Layout layout : {Layout::kNhd, Layout::kPaged}) {
      ExpectNearOracle({.num_kv_heads = 2,
                        .group = 4,
                        .num_rows = 64,
                        .seq_len = 9001,
                        .head_dim = head_dim,
                        .layout = layout});
    }
  }
}

}  // namespace
}  // namespace keepset::kernels
