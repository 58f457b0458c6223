// Window scores by Hopper's kernels against plain fp64 loops, and which shapes they take: on the
// emulator in every run, on an sm_90 where there is one.
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "kernels/compute_backend.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/kernel_test_support.h"
#if defined(KEEPSET_EMULATED_DEVICE)
#include "tests/kernels/cuda/emulated_runtime.h"
#include "tests/kernels/cuda/simt_emulator.h"
#endif

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

namespace {

// fp32 sums of up to 256 products, and 2^x with two units in the last place.
constexpr double kRelativeTolerance = 2e-4;
constexpr double kAbsoluteTolerance = 1e-7;

constexpr char kByHopper[] = "cuda/sm_90/wgmma";
constexpr char kByPortable[] = "cuda/sm_90";

enum class Reference { kComputed, kGiven };

struct Shape {
  int64_t num_kv_heads = 2;
  int64_t group = 2;
  int64_t num_rows = 5;
  int64_t seq_len = 150;
  int64_t head_dim = 64;
  DType dtype = DType::kBF16;
  Layout layout = Layout::kNhd;
  int64_t block_size = 16;
  int64_t gap = 0;
  RowReduction reduction = RowReduction::kMean;
  Reference reference = Reference::kComputed;
  std::vector<int64_t> row_positions = {};  // empty: the last rows
  std::vector<HeadRows> heads = {};         // empty: all heads
};

struct Tensors {
  DenseTensor q;
  KvTensor k;
  KvTensor v;
  std::vector<int64_t> row_positions;
  float scale;
};

Tensors Random(const Shape& shape, uint32_t seed) {
  std::mt19937 rng(seed);
  const int64_t heads = shape.num_kv_heads * shape.group;
  const int64_t kv_values = shape.num_kv_heads * shape.seq_len * shape.head_dim;
  const auto q = RandomValues(rng, heads * shape.num_rows * shape.head_dim, shape.dtype, 1.5f);
  const auto k = RandomValues(rng, kv_values, shape.dtype);
  const auto v = RandomValues(rng, kv_values, shape.dtype);
  const auto tensor = [&](const std::vector<float>& values) {
    return KvTensor(values, shape.num_kv_heads, shape.seq_len, shape.head_dim, shape.dtype,
                    shape.layout, shape.block_size, shape.gap);
  };
  return {DenseTensor(q, heads, shape.num_rows, shape.head_dim, shape.dtype), tensor(k), tensor(v),
          shape.row_positions.empty() ? LastPositions(shape.num_rows, shape.seq_len)
                                      : shape.row_positions,
          1.0f / std::sqrt(static_cast<float>(shape.head_dim))};
}

std::vector<double> Oracle(const Shape& shape, const Attention& attention) {
  if (shape.heads.empty()) {
    return ReduceOracle(attention.tile, shape.num_kv_heads * shape.group, shape.num_rows,
                        shape.seq_len, shape.reduction);
  }
  std::vector<double> columns;
  for (const HeadRows& one : shape.heads) {
    const auto begin =
        attention.tile.begin() + (one.head * shape.num_rows + one.first_row) * shape.seq_len;
    const std::vector<double> rows(begin, begin + one.num_rows * shape.seq_len);
    const std::vector<double> reduced =
        ReduceOracle(rows, 1, one.num_rows, shape.seq_len, one.reduction);
    columns.insert(columns.end(), reduced.begin(), reduced.end());
  }
  return columns;
}

class HopperParity : public CudaTest {
 protected:
  void SetUp() override {
#if defined(KEEPSET_EMULATED_DEVICE)
    cuda::SetEmulatedDevice(cuda::EmulatedDevice::kSm90);
#endif
    absl::StatusOr<std::unique_ptr<ComputeBackend>> backend =
        NewCudaBackend({.window_kernels = "hopper"});
    if (!backend.ok() && !kIsEmulated) GTEST_SKIP() << backend.status().message();
    ASSERT_TRUE(backend.ok()) << backend.status();
    absl::StatusOr<std::unique_ptr<OpContext>> context = (*backend)->NewContext();
    ASSERT_TRUE(context.ok()) << context.status();
    cuda_.backend = *std::move(backend);
    cuda_.context = *std::move(context);
    cpu_.backend = CpuBackend();
    context = cpu_.backend->NewContext();
    ASSERT_TRUE(context.ok()) << context.status();
    cpu_.context = *std::move(context);
  }
  void TearDown() override {
    cuda_.context.reset();
    cuda_.backend.reset();
#if defined(KEEPSET_EMULATED_DEVICE)
    cuda::SetEmulationSeed(1);
    cuda::SetEmulatedDevice(cuda::EmulatedDevice::kSm86);
#endif
  }

  // Columns of the backend; says in name_ which kernels made them.
  absl::StatusOr<std::vector<float>> Columns(const Shape& shape, const Tensors& tensors,
                                             const DenseTensor* lse = nullptr,
                                             std::vector<float>* norms = nullptr) {
    const DeviceDense q(tensors.q);
    const DeviceKv k(tensors.k);
    const DeviceKv v(tensors.v);
    std::optional<DeviceDense> device_lse;
    WindowArgs args;
    args.q = q.queries();
    args.k = k.view();
    args.row_positions = tensors.row_positions;
    if (lse != nullptr) {
      device_lse.emplace(*lse);
      args.window_lse = device_lse->lse();
    }
    args.softmax_scale = tensors.scale;
    args.reduction = shape.reduction;
    args.what = "layer 3";
    args.heads = shape.heads;
    const int64_t rows = shape.heads.empty() ? shape.num_kv_heads * shape.group
                                             : static_cast<int64_t>(shape.heads.size());
    std::unique_ptr<ScoreBuffer> norm_buffer;
    if (norms != nullptr) {
      norm_buffer = cuda_.Buffer(shape.num_kv_heads, shape.seq_len);
      args.v = v.view();
      args.value_norms = norm_buffer.get();
    }
    const std::unique_ptr<ScoreBuffer> out = cuda_.Buffer(rows, shape.seq_len);
    absl::Status status = cuda_.backend->WindowColumns(*cuda_.context, args, *out);
    if (status.ok()) status = cuda_.backend->Wait(*cuda_.context);
    name_ = cuda_.backend->NameFor(*cuda_.context);
    if (!status.ok()) return status;
    if (norms != nullptr) *norms = cuda_.Values(*norm_buffer);
    return cuda_.Values(*out);
  }

  void ExpectNearOracle(const Shape& shape, const std::string& name = kByHopper) {
    const Tensors tensors = Random(shape, 11);
    const Attention attention =
        AttentionOracle(tensors.q, tensors.k, tensors.row_positions, tensors.scale);
    std::optional<DenseTensor> lse;
    if (shape.reference == Reference::kGiven) {
      lse.emplace(std::vector<float>(attention.lse.begin(), attention.lse.end()),
                  shape.num_kv_heads * shape.group, shape.num_rows, 1, DType::kF32);
    }
    const absl::StatusOr<std::vector<float>> columns =
        Columns(shape, tensors, lse.has_value() ? &*lse : nullptr);
    ASSERT_TRUE(columns.ok()) << columns.status();
    EXPECT_EQ(name_, name);
    const std::vector<double> want = Oracle(shape, attention);
    ASSERT_EQ(columns->size(), want.size());
    for (size_t i = 0; i < want.size(); ++i) {
      ASSERT_NEAR((*columns)[i], want[i], kAbsoluteTolerance + kRelativeTolerance * want[i])
          << "row " << i / shape.seq_len << " position " << i % shape.seq_len;
    }
  }

  std::string name_;
};

TEST_F(HopperParity, GivenLogSumExp) { ExpectNearOracle({.reference = Reference::kGiven}); }

TEST_F(HopperParity, GivenLogSumExpF16) {
  ExpectNearOracle({.dtype = DType::kF16, .reference = Reference::kGiven});
}

TEST_F(HopperParity, ComputedLogSumExp) { ExpectNearOracle({}); }

TEST_F(HopperParity, ComputedLogSumExpF16) { ExpectNearOracle({.dtype = DType::kF16}); }

TEST_F(HopperParity, HeadDimension128) {
  ExpectNearOracle({.num_rows = 33, .seq_len = 200, .head_dim = 128});
}

TEST_F(HopperParity, HeadDimension256) {
  ExpectNearOracle({.num_kv_heads = 1, .num_rows = 9, .head_dim = 256});
}

TEST_F(HopperParity, HeadDimensionsBetweenSpans) {
  for (const int64_t head_dim : {72, 80, 96, 192, 320}) {
    ExpectNearOracle({.num_kv_heads = 1, .seq_len = 70, .head_dim = head_dim});
  }
}

TEST_F(HopperParity, HeadsBeforeTokens) { ExpectNearOracle({.layout = Layout::kHnd}); }

TEST_F(HopperParity, OneKvHead) { ExpectNearOracle({.num_kv_heads = 1, .layout = Layout::kPaged}); }

TEST_F(HopperParity, OneTokenAndOneRow) { ExpectNearOracle({.num_rows = 1, .seq_len = 1}); }

TEST_F(HopperParity, PagesOfEveryKind) {
  for (const int64_t block_size : {8, 24, 64, 128}) {
    ExpectNearOracle({.layout = Layout::kPaged, .block_size = block_size});
  }
}

TEST_F(HopperParity, SeveralChunks) {
  ExpectNearOracle({.num_kv_heads = 1, .group = 1, .num_rows = 3, .seq_len = 1100});
}

TEST_F(HopperParity, StagesAreFilledAgain) {
  // 13 tiles and 8 stages of Columns in a block of the emulator, 8 and 4 of RowStats.
  ExpectNearOracle({.num_rows = 3, .seq_len = 1200, .head_dim = 128});
}

TEST_F(HopperParity, RowsOfTwoProducts) {
  // 4 x 64 slots of Columns in one product, 256 rows of RowStats in four.
  ExpectNearOracle({.num_kv_heads = 1, .group = 4, .num_rows = 64, .seq_len = 130});
}

TEST_F(HopperParity, RowsOfManyProducts) {
  // 5 x 72 slots: two products of 256; 350 rows: two parts of RowStats.
  ExpectNearOracle({.num_kv_heads = 1, .group = 5, .num_rows = 70, .seq_len = 90});
}

TEST_F(HopperParity, OutputsOfSeveralParts) {
  // 9 x 64 slots of which shared memory holds 512; the value norms come once.
  ExpectNearOracle({.num_kv_heads = 1, .group = 9, .num_rows = 64, .seq_len = 70});
}

TEST_F(HopperParity, MaximumOverRows) { ExpectNearOracle({.reduction = RowReduction::kMax}); }

TEST_F(HopperParity, SumOverRows) { ExpectNearOracle({.reduction = RowReduction::kSum}); }

TEST_F(HopperParity, LastRowOnly) { ExpectNearOracle({.reduction = RowReduction::kLast}); }

TEST_F(HopperParity, RowsInTheMiddleOfThePrompt) {
  ExpectNearOracle({.num_rows = 3, .row_positions = {0, 33, 70}});
}

TEST_F(HopperParity, ListedHeads) {
  const std::vector<HeadRows> heads = {{1, 0, 70, RowReduction::kMean},
                                       {1, 4, 3, RowReduction::kMax},
                                       {2, 0, 70, RowReduction::kLast},
                                       {6, 2, 66, RowReduction::kSum}};
  for (const Reference reference : {Reference::kComputed, Reference::kGiven}) {
    ExpectNearOracle({.num_kv_heads = 3,
                      .group = 3,
                      .num_rows = 70,
                      .seq_len = 100,
                      .reference = reference,
                      .heads = heads});
  }
}

TEST_F(HopperParity, ListedHeadsHaveTheSameBitsInAnyCompany) {
  Shape shape = {.num_kv_heads = 2, .group = 3, .num_rows = 20, .seq_len = 90};
  const std::vector<HeadRows> heads = {{0, 0, 20, RowReduction::kMean},
                                       {1, 3, 9, RowReduction::kSum},
                                       {4, 0, 20, RowReduction::kMax}};
  const Tensors tensors = Random(shape, 4);
  shape.heads = heads;
  const std::vector<float> together = *Columns(shape, tensors);
  for (size_t j = 0; j < heads.size(); ++j) {
    shape.heads = {heads[j]};
    const auto first = together.begin() + static_cast<int64_t>(j) * shape.seq_len;
    EXPECT_EQ(*Columns(shape, tensors), std::vector<float>(first, first + shape.seq_len)) << j;
  }
}

TEST_F(HopperParity, ValueNormsComeAlong) {
  for (const int64_t head_dim : {64, 128, 192}) {
    const Shape shape = {
        .num_kv_heads = 1, .seq_len = 260, .head_dim = head_dim, .layout = Layout::kPaged};
    const Tensors tensors = Random(shape, 5);
    std::vector<float> norms;
    ASSERT_TRUE(Columns(shape, tensors, nullptr, &norms).ok());
    EXPECT_EQ(name_, kByHopper);
    const std::unique_ptr<ScoreBuffer> twin = cpu_.Buffer(shape.num_kv_heads, shape.seq_len);
    ASSERT_TRUE(cpu_.backend->RowNorms(*cpu_.context, tensors.v.view(), "v", *twin).ok());
    const std::vector<float> want = cpu_.Values(*twin);
    for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(norms[i], want[i], 1e-5f * want[i]) << i;
  }
}

TEST_F(HopperParity, LayersTogetherHaveTheBitsOfLayersAlone) {
  // On the emulator 24 of the 32 units share a launch, with three layers or a part of them.
  const Shape shape = {
      .num_kv_heads = 8, .group = 1, .num_rows = 7, .seq_len = 90, .layout = Layout::kPaged};
  std::vector<Tensors> tensors;
  for (uint32_t layer = 0; layer < 4; ++layer) tensors.push_back(Random(shape, 30 + layer));
  std::vector<std::unique_ptr<DeviceDense>> queries;
  std::vector<std::unique_ptr<DeviceKv>> keys;
  std::vector<std::unique_ptr<ScoreBuffer>> buffers;
  std::vector<WindowArgs> layers;
  std::vector<ScoreBuffer*> outs;
  for (const Tensors& layer : tensors) {
    queries.push_back(std::make_unique<DeviceDense>(layer.q));
    keys.push_back(std::make_unique<DeviceKv>(layer.k));
    buffers.push_back(cuda_.Buffer(8, shape.seq_len));
    outs.push_back(buffers.back().get());
    WindowArgs args;
    args.q = queries.back()->queries();
    args.k = keys.back()->view();
    args.row_positions = layer.row_positions;
    args.softmax_scale = layer.scale;
    args.what = "layer";
    layers.push_back(args);
  }
  const absl::Status status = cuda_.backend->WindowColumnsOfLayers(*cuda_.context, layers, outs);
  ASSERT_TRUE(status.ok()) << status;
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const std::vector<float> together = cuda_.Values(*outs[layer]);
    const std::unique_ptr<ScoreBuffer> alone = cuda_.Buffer(8, shape.seq_len);
    ASSERT_TRUE(cuda_.backend->WindowColumns(*cuda_.context, layers[layer], *alone).ok());
    EXPECT_EQ(together, cuda_.Values(*alone)) << "layer " << layer;
  }
}

TEST_F(HopperParity, NanInKeyNamesHeadAndPosition) {
  const Shape shape;
  Tensors tensors = Random(shape, 2);
  tensors.k.Set(1, 140, 31, std::numeric_limits<float>::quiet_NaN());
  EXPECT_EQ(Columns(shape, tensors).status().message(),
            "layer 3: k: head 1 position 140 is not finite");
}

TEST_F(HopperParity, InfinityInKeyThatNoRowSeesIsRefused) {
  const Shape shape = {.num_rows = 1, .row_positions = {10}};
  Tensors tensors = Random(shape, 2);
  tensors.k.Set(0, 149, 0, -std::numeric_limits<float>::infinity());
  EXPECT_EQ(Columns(shape, tensors).status().message(),
            "layer 3: k: head 0 position 149 is not finite");
}

TEST_F(HopperParity, NanInValuesNamesHeadAndPosition) {
  const Shape shape;
  Tensors tensors = Random(shape, 2);
  tensors.v.Set(1, 76, 3, std::numeric_limits<float>::quiet_NaN());
  std::vector<float> norms;
  EXPECT_EQ(Columns(shape, tensors, nullptr, &norms).status().message(),
            "layer 3: v: head 1 position 76 is not finite");
}

TEST_F(HopperParity, LogSumExpFarBelowTheLogitsIsRefused) {
  const Shape shape;
  const Tensors tensors = Random(shape, 2);
  std::vector<float> values(static_cast<size_t>(shape.num_kv_heads * shape.group * shape.num_rows),
                            10.0f);
  values[7] = -500.0f;
  const DenseTensor lse(values, shape.num_kv_heads * shape.group, shape.num_rows, 1, DType::kF32);
  EXPECT_THAT(std::string(Columns(shape, tensors, &lse).status().message()),
              ::testing::HasSubstr("window_lse: head 1 row 2 lies far below"));
}

TEST_F(HopperParity, SmallHeadDimensionTakesThePortableKernels) {
  ExpectNearOracle({.head_dim = 32}, kByPortable);
}

TEST_F(HopperParity, PagesThatAreNotOfEightTokensTakeThePortableKernels) {
  ExpectNearOracle({.layout = Layout::kPaged, .block_size = 12}, kByPortable);
}

TEST_F(HopperParity, StridesThatDoNotNestTakeThePortableKernels) {
  ExpectNearOracle({.gap = 8}, kByPortable);
}

TEST_F(HopperParity, F32TakesThePortableKernels) {
  ExpectNearOracle({.dtype = DType::kF32}, kByPortable);
}

TEST_F(HopperParity, BothKindsInOneOperationAreNamed) {
  ExpectNearOracle({});
  ExpectNearOracle({.head_dim = 32}, "cuda/sm_90/wgmma+portable");
}

TEST_F(HopperParity, LargeShapes) {
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

// Of the two paths, beyond what an oracle in plain loops has time for.
TEST_F(HopperParity, LongRowsLieNearThePortableKernels) {
  if (kIsEmulated) GTEST_SKIP() << "takes minutes on the emulator";
  const Shape shape = {.num_kv_heads = 8,
                       .group = 4,
                       .num_rows = 64,
                       .seq_len = 32768,
                       .head_dim = 128,
                       .layout = Layout::kPaged};
  const Tensors tensors = Random(shape, 17);
  const absl::StatusOr<std::vector<float>> by_hopper = Columns(shape, tensors);
  ASSERT_TRUE(by_hopper.ok()) << by_hopper.status();
  EXPECT_EQ(name_, kByHopper);
  absl::StatusOr<std::unique_ptr<ComputeBackend>> portable = NewCudaBackend({});
  ASSERT_TRUE(portable.ok()) << portable.status();
  cuda_.context.reset();
  cuda_.backend = *std::move(portable);
  absl::StatusOr<std::unique_ptr<OpContext>> context = cuda_.backend->NewContext();
  ASSERT_TRUE(context.ok()) << context.status();
  cuda_.context = *std::move(context);
  const absl::StatusOr<std::vector<float>> by_portable = Columns(shape, tensors);
  ASSERT_TRUE(by_portable.ok()) << by_portable.status();
  EXPECT_EQ(name_, kByPortable);
  for (size_t i = 0; i < by_hopper->size(); ++i) {
    const float want = (*by_portable)[i];
    ASSERT_NEAR((*by_hopper)[i], want, kAbsoluteTolerance + kRelativeTolerance * want) << i;
  }
}

#if defined(KEEPSET_EMULATED_DEVICE)

TEST_F(HopperParity, OrderOfThreadsAndLoadsDoesNotShow) {
  const Shape shape = {.num_kv_heads = 1, .num_rows = 20, .seq_len = 300, .layout = Layout::kPaged};
  const Tensors tensors = Random(shape, 3);
  std::vector<float> norms;
  const std::vector<float> first = *Columns(shape, tensors, nullptr, &norms);
  for (const uint32_t seed : {2u, 3u, 4u}) {
    cuda::SetEmulationSeed(seed);
    std::vector<float> again;
    EXPECT_EQ(*Columns(shape, tensors, nullptr, &again), first) << "seed " << seed;
    EXPECT_EQ(again, norms) << "seed " << seed;
  }
}

// 130 rows: a group has two products of RowStats for each stage, so that its warps may be apart
// when they give the stage back.
TEST_F(HopperParity, StagesAreFilledAgainInAnyOrderOfThreads) {
  for (const uint32_t seed : {2u, 3u, 4u}) {
    cuda::SetEmulationSeed(seed);
    ExpectNearOracle({.num_kv_heads = 1, .num_rows = 65, .seq_len = 1600, .head_dim = 128});
  }
}

TEST(HopperSelection, AnotherArchitectureIsRefused) {
  EXPECT_EQ(NewCudaBackend({.window_kernels = "hopper"}).status().message(),
            "cuda: window_kernels=\"hopper\": device 0 is sm_86, want sm_90");
}

TEST(HopperSelection, ADriverWithoutTensorMapsIsRefused) {
  cuda::SetEmulatedDevice(cuda::EmulatedDevice::kSm90WithoutTensorMaps);
  const absl::Status status = NewCudaBackend({.window_kernels = "hopper"}).status();
  cuda::SetEmulatedDevice(cuda::EmulatedDevice::kSm86);
  EXPECT_EQ(status.message(),
            "cuda: window_kernels=\"hopper\": the driver has no cuTensorMapEncodeTiled (an older "
            "driver), want one of CUDA 12.0 or later");
}

TEST(HopperSelection, AnotherNameIsRefused) {
  EXPECT_EQ(NewCudaBackend({.window_kernels = "fastest"}).status().message(),
            "cuda: window_kernels=\"fastest\", want \"portable\" or \"hopper\"");
}

#endif

}  // namespace
}  // namespace keepset::kernels
