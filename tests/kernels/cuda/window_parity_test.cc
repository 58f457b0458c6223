// Window scores of the CUDA backend against plain fp64 loops.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/compute_backend.h"
#include "tests/fakes/test_seed.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/window_fixture.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {
namespace {

using ::testing::HasSubstr;

using Shape = WindowCaseOf<77, 32, 8>;  // a gap of 3: the general kernels, not tensor cores

class WindowParity : public CudaTest {
 protected:
  using Tensors = WindowTensors;

  static Tensors Random(const Shape& shape, uint32_t seed) { return RandomWindow(shape, seed); }

  // The columns of the CUDA backend.
  absl::StatusOr<std::vector<float>> Columns(const Shape& shape, const Tensors& tensors,
                                             const DenseTensor* lse = nullptr,
                                             std::vector<float>* norms = nullptr) {
    return WindowColumnsOn(cuda_, shape, tensors, lse, norms);
  }

  void ExpectValueNorms(const Shape& shape) {
    const Tensors tensors = Random(shape, 5);
    std::vector<float> norms;
    ASSERT_TRUE(Columns(shape, tensors, nullptr, &norms).ok());
    const std::unique_ptr<ScoreBuffer> twin = cpu_.Buffer(shape.num_kv_heads, shape.seq_len);
    ASSERT_TRUE(cpu_.backend->RowNorms(*cpu_.context, tensors.v.view(), "v", *twin).ok());
    const std::vector<float> want = cpu_.Values(*twin);
    for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(norms[i], want[i], 1e-5f * want[i]) << i;
  }

  void ExpectNearOracle(const Shape& shape, uint32_t seed = 11) {
    const Tensors tensors = Random(shape, seed);
    const Attention attention = AttentionOf(tensors);
    const std::optional<DenseTensor> lse = GivenLse(shape, attention);
    const absl::StatusOr<std::vector<float>> columns =
        Columns(shape, tensors, lse.has_value() ? &*lse : nullptr);
    ASSERT_TRUE(columns.ok()) << columns.status();
    ExpectNear(*columns, shape, attention);
  }
};

TEST_F(WindowParity, TensorCoresBf16) { ExpectNearOracle({}); }

TEST_F(WindowParity, TensorCoresF16) { ExpectNearOracle({.dtype = DType::kF16}); }

TEST_F(WindowParity, TensorCoresHnd) { ExpectNearOracle({.layout = Layout::kHnd}); }

TEST_F(WindowParity, TensorCoresPagedWithShuffledBlocks) {
  ExpectNearOracle({.seq_len = 93, .layout = Layout::kPaged});
}

TEST_F(WindowParity, TensorCoresMoreThanOneChunk) {
  // 512 tokens of the first chunk, and a second one that is not full.
  ExpectNearOracle({.num_kv_heads = 1, .group = 1, .seq_len = 577, .head_dim = 16});
}

TEST_F(WindowParity, TensorCoresMoreRowsThanOneTile) {
  // 70 rows of a head: two column tiles; 140 of the group: several row tiles.
  ExpectNearOracle({.num_kv_heads = 1, .num_rows = 70, .seq_len = 131, .head_dim = 16});
}

TEST_F(WindowParity, TensorCoresMoreTokensThanOneTile) {
  ExpectNearOracle({.num_kv_heads = 1, .group = 3, .num_rows = 9, .seq_len = 301, .head_dim = 16});
}

TEST_F(WindowParity, HeadDimensionOf8Modulo16IsPadded) { ExpectNearOracle({.head_dim = 40}); }

TEST_F(WindowParity, WideHeadDimensionUsesFewerWarps) {
  ExpectNearOracle({.num_kv_heads = 1, .group = 1, .num_rows = 3, .seq_len = 70, .head_dim = 256});
}

TEST_F(WindowParity, GivenLogSumExp) { ExpectNearOracle({.reference = Reference::kGiven}); }

TEST_F(WindowParity, GivenLogSumExpToBaseTwo) {
  for (const int64_t gap : {8, 3}) {
    ExpectNearOracle({.gap = gap, .reference = Reference::kGiven, .lse_base = LogBase::kTwo});
  }
}

TEST_F(WindowParity, GivenLogSumExpOnGeneralKernels) {
  ExpectNearOracle({.gap = 3, .reference = Reference::kGiven});
}

TEST_F(WindowParity, MaximumOverRows) { ExpectNearOracle({.reduction = RowReduction::kMax}); }

TEST_F(WindowParity, SumOverRows) { ExpectNearOracle({.reduction = RowReduction::kSum}); }

TEST_F(WindowParity, LastRowOnly) { ExpectNearOracle({.reduction = RowReduction::kLast}); }

TEST_F(WindowParity, LastRowOnlyWithGivenLogSumExp) {
  ExpectNearOracle({.reduction = RowReduction::kLast, .reference = Reference::kGiven});
}

TEST_F(WindowParity, GeneralKernelsF32) { ExpectNearOracle({.dtype = DType::kF32}); }

TEST_F(WindowParity, GeneralKernelsOddHeadDimension) {
  ExpectNearOracle({.head_dim = 37, .gap = 3, .reduction = RowReduction::kMax});
}

TEST_F(WindowParity, GeneralKernelsPaged) {
  ExpectNearOracle(
      {.num_rows = 67, .seq_len = 93, .dtype = DType::kF16, .layout = Layout::kPaged, .gap = 3});
}

TEST_F(WindowParity, RowsInTheMiddleOfThePrompt) {
  ExpectNearOracle({.num_rows = 3, .row_positions = {0, 33, 70}});
}

TEST_F(WindowParity, OneTokenAndOneRow) { ExpectNearOracle({.num_rows = 1, .seq_len = 1}); }

TEST_F(WindowParity, TensorsInHostMemory) {
  ExpectNearOracle({.layout = Layout::kPaged, .gap = 3, .memory = Memory::kHost});
}

// Layers in one call, among them one in host memory with strides of its own, and one that wants
// other heads.
TEST_F(WindowParity, LayersTogetherHaveTheBitsOfLayersAlone) {
  const Shape shape = {.num_rows = 7, .seq_len = 90, .layout = Layout::kPaged};
  std::vector<Tensors> tensors;
  for (uint32_t layer = 0; layer < 6; ++layer) tensors.push_back(Random(shape, 30 + layer));
  std::vector<std::unique_ptr<DeviceDense>> queries;
  std::vector<std::unique_ptr<DeviceKv>> keys;
  std::vector<std::unique_ptr<ScoreBuffer>> buffers;
  const std::vector<HeadRows> listed = {{0, 2, 3, RowReduction::kMax},
                                        {1, 0, 7, RowReduction::kMean},
                                        {3, 0, 7, RowReduction::kSum},
                                        {3, 6, 1, RowReduction::kLast}};
  std::vector<WindowArgs> layers;
  std::vector<ScoreBuffer*> outs;
  for (size_t layer = 0; layer < tensors.size(); ++layer) {
    queries.push_back(std::make_unique<DeviceDense>(tensors[layer].q));
    keys.push_back(std::make_unique<DeviceKv>(tensors[layer].k));
    buffers.push_back(cuda_.Buffer(4, shape.seq_len));
    outs.push_back(buffers.back().get());
    WindowArgs args;
    args.q = queries.back()->queries();
    args.k = layer == 2 ? tensors[layer].k.view() : keys.back()->view();
    args.row_positions = tensors[layer].row_positions;
    args.softmax_scale = tensors[layer].scale;
    args.what = "layer";
    if (layer >= 4) args.heads = listed;
    layers.push_back(args);
  }
  const absl::Status status = cuda_.backend->WindowColumnsOfLayers(*cuda_.context, layers, outs);
  ASSERT_TRUE(status.ok()) << status;
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const std::vector<float> together = cuda_.Values(*outs[layer]);
    const std::unique_ptr<ScoreBuffer> alone = cuda_.Buffer(4, shape.seq_len);
    ASSERT_TRUE(cuda_.backend->WindowColumns(*cuda_.context, layers[layer], *alone).ok());
    EXPECT_EQ(together, cuda_.Values(*alone)) << "layer " << layer;
  }
}

TEST_F(WindowParity, TheFirstRefusedLayerOfManyIsReported) {
  const Shape shape = {.num_rows = 2, .seq_len = 20, .head_dim = 16};
  const Tensors good = Random(shape, 1);
  Tensors bad = Random(shape, 1);
  bad.k.Set(1, 9, 0, std::numeric_limits<float>::quiet_NaN());
  // More layers than one launch takes.
  constexpr size_t kLayers = 45;
  std::vector<std::string> names;
  for (size_t layer = 0; layer < kLayers; ++layer) names.push_back(absl::StrCat("layer ", layer));
  const auto status = [&](const Machine& machine) {
    std::vector<std::unique_ptr<ScoreBuffer>> buffers;
    std::vector<WindowArgs> layers;
    std::vector<ScoreBuffer*> outs;
    for (size_t layer = 0; layer < kLayers; ++layer) {
      const Tensors& tensors = layer == 41 || layer == 43 ? bad : good;
      buffers.push_back(machine.Buffer(4, shape.seq_len));
      outs.push_back(buffers.back().get());
      WindowArgs args;
      args.q = tensors.q.queries();
      args.k = tensors.k.view();
      args.row_positions = tensors.row_positions;
      args.softmax_scale = tensors.scale;
      args.what = names[layer];
      layers.push_back(args);
    }
    absl::Status refused = machine.backend->WindowColumnsOfLayers(*machine.context, layers, outs);
    if (refused.ok()) refused = machine.backend->Wait(*machine.context);
    return refused;
  };
  EXPECT_EQ(status(cuda_), status(cpu_));
  EXPECT_EQ(status(cuda_).message(), "layer 41: k: head 1 position 9 is not finite");
}

// Observations of two heads of one KV head, of which one is listed twice, and of another one; the
// KV head between them is left out.
std::vector<HeadRows> SomeHeads() {
  return {{1, 0, 70, RowReduction::kMean},
          {1, 4, 3, RowReduction::kMax},
          {2, 0, 70, RowReduction::kLast},
          {6, 2, 66, RowReduction::kSum}};
}

Shape ListedHeads() {
  return {.num_kv_heads = 3, .group = 3, .num_rows = 70, .head_dim = 16, .heads = SomeHeads()};
}

TEST_F(WindowParity, ListedHeadsOnTensorCores) { ExpectNearOracle(ListedHeads()); }

TEST_F(WindowParity, ListedHeadsOnGeneralKernels) {
  Shape shape = ListedHeads();
  shape.dtype = DType::kF32;
  shape.gap = 3;
  ExpectNearOracle(shape);
}

TEST_F(WindowParity, ListedHeadsWithGivenLogSumExp) {
  Shape shape = ListedHeads();
  shape.reference = Reference::kGiven;
  ExpectNearOracle(shape);
}

TEST_F(WindowParity, ListedHeadsHaveTheSameBitsInAnyCompany) {
  Shape shape = ListedHeads();
  const Tensors tensors = Random(shape, 4);
  const std::vector<float> together = *Columns(shape, tensors);
  const std::vector<HeadRows> listed = SomeHeads();
  for (size_t j = 0; j < listed.size(); ++j) {
    shape.heads = {listed[j]};
    const auto first = together.begin() + static_cast<int64_t>(j) * shape.seq_len;
    EXPECT_EQ(*Columns(shape, tensors), std::vector<float>(first, first + shape.seq_len)) << j;
  }
}

TEST_F(WindowParity, KeysOfKvHeadsThatAreNotListedAreNotRead) {
  const Shape shape = ListedHeads();
  Tensors tensors = Random(shape, 4);
  tensors.k.Set(1, 5, 0, std::numeric_limits<float>::quiet_NaN());
  EXPECT_TRUE(Columns(shape, tensors).ok());
  tensors.k.Set(2, 5, 0, std::numeric_limits<float>::quiet_NaN());
  EXPECT_EQ(Columns(shape, tensors).status().message(),
            "layer 3: k: head 2 position 5 is not finite");
}

TEST_F(WindowParity, ListedHeadsNameHeadAndRowOfTheCall) {
  const Shape shape = ListedHeads();
  Tensors tensors = Random(shape, 4);
  tensors.q.Set(6, 9, 0, std::numeric_limits<float>::infinity());
  EXPECT_EQ(Columns(shape, tensors).status().message(), "layer 3: q: head 6 row 9 is not finite");
}

TEST_F(WindowParity, ValueNormsOfAllHeadsComeAlongWithListedHeads) {
  ExpectValueNorms(ListedHeads());
}

TEST_F(WindowParity, HeadDimensionsOfOtherModels) {
  for (const int64_t head_dim : {64, 80, 96, 112, 192, 256, 576}) {
    ExpectNearOracle({.num_kv_heads = 1,
                      .group = 2,
                      .num_rows = 3,
                      .seq_len = 70,
                      .head_dim = head_dim,
                      .layout = Layout::kPaged});
  }
}

TEST_F(WindowParity, ValueNormsComeAlong) { ExpectValueNorms({.layout = Layout::kPaged}); }

TEST_F(WindowParity, ValueNormsComeAlongOnGeneralKernels) {
  ExpectValueNorms({.dtype = DType::kF32, .gap = 3});
}

TEST_F(WindowParity, SameInputsSameBits) {
  const Shape shape = {.num_rows = 20, .seq_len = 600, .head_dim = 16};
  const Tensors tensors = Random(shape, 3);
  const absl::StatusOr<std::vector<float>> first = Columns(shape, tensors);
  const absl::StatusOr<std::vector<float>> second = Columns(shape, tensors);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(*first, *second);
}

// Logits are never written anywhere, so a wide range of them has to survive the exponent.
TEST_F(WindowParity, LogitsFarApart) {
  Shape shape;
  shape.num_rows = 2;
  Tensors tensors = Random(shape, 9);
  for (int64_t c = 0; c < shape.head_dim; ++c) {
    tensors.k.Set(0, 7, c, 40.0f * std::copysign(1.0f, tensors.q.At(0, 0, c)));
  }
  const absl::StatusOr<std::vector<float>> columns = Columns(shape, tensors);
  ASSERT_TRUE(columns.ok()) << columns.status();
  const std::vector<double> want = WindowOracle(shape, AttentionOf(tensors));
  for (size_t i = 0; i < want.size(); ++i) {
    // The logits' own rounding grows with their size.
    ASSERT_NEAR((*columns)[i], want[i], kWindowAbsolute + 1e-3 * want[i]) << i;
  }
}

TEST_F(WindowParity, NanInKeyNamesHeadAndPosition) {
  for (const int64_t gap : {8, 3}) {
    const Shape shape = {.gap = gap};
    Tensors tensors = Random(shape, 2);
    tensors.k.Set(1, 40, 31, std::numeric_limits<float>::quiet_NaN());
    const absl::Status status = Columns(shape, tensors).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), "layer 3: k: head 1 position 40 is not finite");
  }
}

TEST_F(WindowParity, InfinityInKeyThatNoRowSeesIsRefused) {
  const Shape shape = {.num_rows = 1, .row_positions = {10}};
  Tensors tensors = Random(shape, 2);
  tensors.k.Set(0, 76, 0, std::numeric_limits<float>::infinity());
  EXPECT_EQ(Columns(shape, tensors).status().message(),
            "layer 3: k: head 0 position 76 is not finite");
}

TEST_F(WindowParity, NanInQueryNamesHeadAndRow) {
  const Shape shape;
  Tensors tensors = Random(shape, 2);
  tensors.q.Set(3, 4, 0, std::numeric_limits<float>::quiet_NaN());
  EXPECT_EQ(Columns(shape, tensors).status().message(), "layer 3: q: head 3 row 4 is not finite");
}

TEST_F(WindowParity, NanInValuesNamesHeadAndPosition) {
  const Shape shape;
  Tensors tensors = Random(shape, 2);
  tensors.v.Set(1, 76, 3, std::numeric_limits<float>::quiet_NaN());
  std::vector<float> norms;
  EXPECT_EQ(Columns(shape, tensors, nullptr, &norms).status().message(),
            "layer 3: v: head 1 position 76 is not finite");
}

TEST_F(WindowParity, OverflowingLogitIsRefused) {
  const Shape shape = {.dtype = DType::kF32};
  Tensors tensors = Random(shape, 2);
  tensors.q.Set(0, 0, 0, 1e30f);
  tensors.k.Set(0, 5, 0, 1e30f);
  const absl::Status status = Columns(shape, tensors).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("logits: head 0 row 0 position 5"));
}

// Token 12 overflows for row 0 alone, which does not see it.
TEST_F(WindowParity, ATokenWithNothingToReportHidesNoLaterOne) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const Shape shape = {.num_rows = 2, .dtype = dtype, .row_positions = {10, 20}};
    Tensors tensors = Random(shape, 2);
    tensors.q.Set(0, 0, 0, 1e30f);
    tensors.k.Set(0, 12, 0, 1e30f);
    EXPECT_TRUE(Columns(shape, tensors).ok());
    tensors.q.Set(0, 1, 1, 1e30f);
    tensors.k.Set(0, 13, 1, 1e30f);
    EXPECT_THAT(std::string(Columns(shape, tensors).status().message()),
                HasSubstr("logits: head 0 row 1 position 13"));
  }
}

TEST_F(WindowParity, LogSumExpFarBelowTheLogitsIsRefused) {
  const Shape shape = {.reference = Reference::kGiven};
  const Tensors tensors = Random(shape, 2);
  std::vector<float> values(shape.num_kv_heads * shape.group * shape.num_rows, 10.0f);
  values[7] = -500.0f;
  const DenseTensor lse(values, shape.num_kv_heads * shape.group, shape.num_rows, 1, DType::kF32);
  const absl::Status status = Columns(shape, tensors, &lse).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("window_lse: head 1 row 2 lies far below"));
}

TEST_F(WindowParity, LogSumExpThatIsNotFiniteIsRefused) {
  const Shape shape = {.reference = Reference::kGiven};
  const Tensors tensors = Random(shape, 2);
  std::vector<float> values(shape.num_kv_heads * shape.group * shape.num_rows, 10.0f);
  values[3] = std::numeric_limits<float>::quiet_NaN();
  const DenseTensor lse(values, shape.num_kv_heads * shape.group, shape.num_rows, 1, DType::kF32);
  EXPECT_EQ(Columns(shape, tensors, &lse).status().message(),
            "layer 3: window_lse: head 0 row 3 is not finite");
}

TEST_F(WindowParity, RefusedLayerLeavesTheContextUsable) {
  const Shape shape;
  Tensors tensors = Random(shape, 2);
  tensors.k.Set(1, 40, 31, std::numeric_limits<float>::quiet_NaN());
  EXPECT_FALSE(Columns(shape, tensors).ok());
  ExpectNearOracle(shape);
}

TEST_F(WindowParity, LargeShapes) {
  if (kIsEmulated) GTEST_SKIP() << "takes minutes on the emulator";
  for (const Reference reference : {Reference::kComputed, Reference::kGiven}) {
    for (const Layout layout : {Layout::kNhd, Layout::kPaged}) {
      ExpectNearOracle({.num_kv_heads = 2,
                        .group = 4,
                        .num_rows = 64,
                        .seq_len = 4099,
                        .head_dim = 128,
                        .layout = layout,
                        .reference = reference});
    }
  }
}

}  // namespace
}  // namespace keepset::kernels
