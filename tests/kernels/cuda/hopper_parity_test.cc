// Window scores by Hopper's kernels against plain fp64 loops, and which shapes they take: on the
// emulator in every run, on an sm_90 where there is one.
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/compute_backend.h"
#include "tests/kernels/cuda/hopper_fixture.h"
#include "tests/kernels/kernel_test_support.h"
#if defined(KEEPSET_EMULATED_DEVICE)
#include "tests/kernels/cuda/emulated_runtime.h"
#endif

namespace keepset::kernels {
namespace {

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
  // 5 x 72 slots: two products of 256; 350 rows: six products of RowStats.
  ExpectNearOracle({.num_kv_heads = 1, .group = 5, .num_rows = 70, .seq_len = 90});
}

TEST_F(HopperParity, GroupsTakeTurnsWithAnOddNumberOfProducts) {
  // One, three and seven products of RowStats in each of five tiles.
  for (const int64_t group : {1, 3, 7}) {
    ExpectNearOracle(
        {.num_kv_heads = 2, .group = group, .num_rows = 64, .seq_len = 70, .head_dim = 128});
    ExpectNearOracle({.num_kv_heads = 1, .group = group, .num_rows = 62, .seq_len = 600});
  }
}

TEST_F(HopperParity, EightHeadsOfOneKvHeadInOnePart) {
  ExpectNearOracle(
      {.num_kv_heads = 1, .group = 8, .num_rows = 64, .seq_len = 300, .head_dim = 128});
}

TEST_F(HopperParity, OutputsThatEndAtMultiplesOfEveryWidth) {
  // With four heads outputs of 8, 16, 24, 32 and 40 slots in products of 64, 64, 128, 128 and 256;
  // with eight of 32 in one of 256. The first tiles are masked for no row.
  for (const int64_t num_rows : {8, 16, 24, 32, 40}) {
    ExpectNearOracle({.num_kv_heads = 1, .group = 4, .num_rows = num_rows, .seq_len = 230});
  }
  ExpectNearOracle({.num_kv_heads = 1, .group = 8, .num_rows = 32, .seq_len = 230});
}

TEST_F(HopperParity, OutputsOfSeveralParts) {
  // 9 x 64 slots of which shared memory holds 512, 9 products of RowStats in two parts; the value
  // norms come once.
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

TEST_F(HopperParity, ValueNormsComeAlong) {
  for (const int64_t head_dim : {64, 128, 192}) {
    ExpectNormsNearCpu(
        {.num_kv_heads = 1, .seq_len = 260, .head_dim = head_dim, .layout = Layout::kPaged});
  }
}

TEST_F(HopperParity, ValueNormsOfEveryRowSizeAndLayout) {
  for (const Layout layout : {Layout::kNhd, Layout::kHnd, Layout::kPaged}) {
    for (const int64_t head_dim : {64, 128, 256}) {
      // The last batch of rows is not whole; 3 tiles and more for each of the three warps.
      ExpectNormsNearCpu({.num_kv_heads = 1,
                          .num_rows = 2,
                          .seq_len = 1601,
                          .head_dim = head_dim,
                          .dtype = DType::kF16,
                          .layout = layout});
    }
  }
}

TEST_F(HopperParity, ValueNormsOfPagesOfEverySize) {
  for (const int64_t block_size : {8, 16, 24, 32, 128}) {
    ExpectNormsNearCpu(
        {.num_kv_heads = 2, .seq_len = 270, .layout = Layout::kPaged, .block_size = block_size});
  }
}

TEST_F(HopperParity, ValuesOfAnotherTypeHaveNorms) {
  const WindowCase shape = {.num_kv_heads = 2, .seq_len = 130};
  WindowTensors tensors = RandomWindow(shape, 5);
  WindowCase wide = shape;
  wide.dtype = DType::kF32;
  tensors.v = RandomWindow(wide, 6).v;
  ExpectNormsNearCpu(shape, tensors);
}

TEST_F(HopperParity, NormsWhoseSquaresDoNotFitFp32AreRight) {
  const WindowCase shape = {.num_kv_heads = 2, .seq_len = 270};
  WindowTensors tensors = RandomWindow(shape, 5);
  tensors.v.Set(1, 201, 3, 1e25f);
  ExpectNormsNearCpu(shape, tensors);
}

TEST_F(HopperParity, NormsWhoseSquaresAreBelowFp32AreRight) {
  for (const int64_t head_dim : {64, 128, 256}) {
    const WindowCase shape = {
        .num_kv_heads = 2, .num_rows = 2, .seq_len = 270, .head_dim = head_dim};
    WindowTensors tensors = RandomWindow(shape, 5);
    for (int64_t c = 0; c < head_dim; ++c) {
      tensors.v.Set(0, 100, c, 0.0f);
      tensors.v.Set(1, 201, c, 1e-23f);
      tensors.v.Set(1, 269, c, 1e-18f);
    }
    std::vector<float> norms;
    ASSERT_TRUE(Columns(shape, tensors, nullptr, &norms).ok());
    const double root = std::sqrt(static_cast<double>(head_dim));
    EXPECT_EQ(norms[100], 0.0f);
    EXPECT_NEAR(norms[270 + 201] / (root * tensors.v.At(1, 201, 0)), 1.0, 1e-6) << head_dim;
    EXPECT_NEAR(norms[270 + 269] / (root * tensors.v.At(1, 269, 0)), 1.0, 1e-6) << head_dim;
  }
}

// Rows up to the batch with the large value are streamed, others are not.
TEST_F(HopperParity, NormsBesideALargeValueKeepTheirBits) {
  for (const int64_t head_dim : {64, 128, 256}) {
    const WindowCase shape = {
        .num_kv_heads = 1, .num_rows = 2, .seq_len = 470, .head_dim = head_dim};
    for (const int64_t position : {0, 250, 469}) {
      WindowTensors tensors = RandomWindow(shape, 5);
      std::vector<float> want;
      ASSERT_TRUE(Columns(shape, tensors, nullptr, &want).ok());
      tensors.v.Set(0, position, 3, 1e25f);
      std::vector<float> norms;
      ASSERT_TRUE(Columns(shape, tensors, nullptr, &norms).ok());
      want[static_cast<size_t>(position)] = norms[static_cast<size_t>(position)];
      EXPECT_NEAR(norms[static_cast<size_t>(position)] / 1e25f, 1.0f, 0.01f);
      EXPECT_EQ(norms, want) << "head_dim " << head_dim << ", position " << position;
    }
  }
}

TEST_F(HopperParity, NanInKeyNamesHeadAndPosition) {
  const WindowCase shape;
  WindowTensors tensors = RandomWindow(shape, 2);
  tensors.k.Set(1, 140, 31, std::numeric_limits<float>::quiet_NaN());
  EXPECT_EQ(Columns(shape, tensors).status().message(),
            "layer 3: k: head 1 position 140 is not finite");
}

TEST_F(HopperParity, InfinityInKeyThatNoRowSeesIsRefused) {
  const WindowCase shape = {.num_rows = 1, .row_positions = {10}};
  WindowTensors tensors = RandomWindow(shape, 2);
  tensors.k.Set(0, 149, 0, -std::numeric_limits<float>::infinity());
  EXPECT_EQ(Columns(shape, tensors).status().message(),
            "layer 3: k: head 0 position 149 is not finite");
}

TEST_F(HopperParity, NanInValuesNamesHeadAndPosition) {
  const WindowCase shape;
  WindowTensors tensors = RandomWindow(shape, 2);
  tensors.v.Set(1, 76, 3, std::numeric_limits<float>::quiet_NaN());
  std::vector<float> norms;
  EXPECT_EQ(Columns(shape, tensors, nullptr, &norms).status().message(),
            "layer 3: v: head 1 position 76 is not finite");
}

TEST_F(HopperParity, LogSumExpFarBelowTheLogitsIsRefused) {
  const WindowCase shape;
  const WindowTensors tensors = RandomWindow(shape, 2);
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
  const WindowCase shape = {.num_kv_heads = 8,
                            .group = 4,
                            .num_rows = 64,
                            .seq_len = 32768,
                            .head_dim = 128,
                            .layout = Layout::kPaged};
  const WindowTensors tensors = RandomWindow(shape, 17);
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
    ASSERT_NEAR((*by_hopper)[i], want, kWindowAbsolute + kWindowRelative * want) << i;
  }
}

#if defined(KEEPSET_EMULATED_DEVICE)

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
            "cuda: window_kernels=\"fastest\", want \"portable\", \"hopper\" or \"cublas\"");
}

#endif

}  // namespace
}  // namespace keepset::kernels
