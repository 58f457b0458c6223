// Row norms, given tiles and gathers of the CUDA backend.
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

using Sets = std::vector<std::vector<int32_t>>;

KvTensor RandomKv(DType dtype, Layout layout, int64_t head_dim, int64_t gap, int64_t seq_len = 53) {
  std::mt19937 rng(fakes::TestSeed(23));
  const auto values = RandomValues(rng, 3 * seq_len * head_dim, dtype);
  return KvTensor(values, 3, seq_len, head_dim, dtype, layout, 16, gap);
}

// A destination: NaN everywhere.
KvTensor PoisonedKv(DType dtype, Layout layout, int64_t head_dim, int64_t gap, int64_t seq_len) {
  const std::vector<float> values(static_cast<size_t>(3 * seq_len * head_dim),
                                  std::numeric_limits<float>::quiet_NaN());
  return KvTensor(values, 3, seq_len, head_dim, dtype, layout, 16, gap);
}

class RowOpsParity : public CudaTest {
 protected:
  absl::Status Norms(const KvView& view, std::vector<float>* norms) {
    const std::unique_ptr<ScoreBuffer> out = cuda_.Buffer(view.num_kv_heads, view.seq_len);
    absl::Status status = cuda_.backend->RowNorms(*cuda_.context, view, "layer 1: v", *out);
    if (status.ok()) status = cuda_.backend->Wait(*cuda_.context);
    if (status.ok()) *norms = cuda_.Values(*out);
    return status;
  }

  absl::Status Columns(const Machine& machine, const TileView& tile,
                       const std::vector<int64_t>& row_positions, RowReduction reduction,
                       std::vector<float>* columns) {
    TileArgs args;
    args.tile = tile;
    args.row_positions = row_positions;
    args.reduction = reduction;
    args.what = "layer 2";
    const std::unique_ptr<ScoreBuffer> out = machine.Buffer(tile.num_qo_heads, tile.seq_len);
    absl::Status status = machine.backend->TileColumns(*machine.context, args, *out);
    if (status.ok()) status = machine.backend->Wait(*machine.context);
    if (status.ok()) *columns = machine.Values(*out);
    return status;
  }

  // Gathers on both machines into copies of `destination`, and compares every byte of them.
  void ExpectSameGather(const KvTensor& in, const KvTensor& destination, const Sets& sets) {
    std::vector<absl::Span<const int32_t>> spans(sets.begin(), sets.end());
    KvTensor twin = destination;
    ASSERT_TRUE(
        cpu_.backend->GatherRows(*cpu_.context, in.view(), spans, twin.mutable_view()).ok());
    const DeviceKv device_in(in);
    const DeviceKv device_out(destination);
    const absl::Status status = cuda_.backend->GatherRows(*cuda_.context, device_in.view(), spans,
                                                          device_out.mutable_view());
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(device_out.Read(), twin.bytes());
    KvTensor host_out = destination;
    ASSERT_TRUE(
        cuda_.backend->GatherRows(*cuda_.context, in.view(), spans, host_out.mutable_view()).ok());
    EXPECT_EQ(host_out.bytes(), twin.bytes());
  }
};

TEST_F(RowOpsParity, NormsOfEveryTypeAndLayout) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const Layout layout : {Layout::kNhd, Layout::kHnd, Layout::kPaged}) {
      for (const int64_t gap : {8, 3}) {
        for (const int64_t head_dim : {8, 40, 128, 33}) {
          const KvTensor tensor = RandomKv(dtype, layout, head_dim, gap);
          std::vector<float> norms;
          const absl::Status status = Norms(DeviceKv(tensor).view(), &norms);
          ASSERT_TRUE(status.ok()) << status;
          for (int64_t g = 0; g < 3; ++g) {
            for (int64_t t = 0; t < 53; ++t) {
              double sum = 0.0;
              for (int64_t c = 0; c < head_dim; ++c) sum += std::pow(tensor.At(g, t, c), 2);
              const double want = std::sqrt(sum);
              ASSERT_NEAR(norms[g * 53 + t], want, 1e-6 * want)
                  << DTypeName(dtype) << " d " << head_dim << " head " << g << " position " << t;
            }
          }
        }
      }
    }
  }
}

TEST_F(RowOpsParity, SquaresBeyondFp32AreSummedCarefully) {
  KvTensor tensor = RandomKv(DType::kF32, Layout::kNhd, 16, 8);
  tensor.Set(1, 20, 0, 3e30f);
  tensor.Set(1, 20, 1, 4e30f);
  std::vector<float> norms;
  ASSERT_TRUE(Norms(DeviceKv(tensor).view(), &norms).ok());
  EXPECT_FLOAT_EQ(norms[53 + 20], 5e30f);
}

// Beside rows of ordinary values, in the same warp, and of zeros.
TEST_F(RowOpsParity, SquaresBelowFp32AreSummedCarefully) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    KvTensor tensor = RandomKv(dtype, Layout::kNhd, 16, 8);
    for (int64_t c = 0; c < 16; ++c) {
      tensor.Set(0, 7, c, 0.0f);
      tensor.Set(1, 20, c, 1e-23f * static_cast<float>(c + 1));
      tensor.Set(1, 22, c, 1e-18f);
      tensor.Set(2, 52, c, 1e-37f);
    }
    std::vector<float> norms;
    ASSERT_TRUE(Norms(DeviceKv(tensor).view(), &norms).ok());
    for (int64_t g = 0; g < 3; ++g) {
      for (int64_t t = 0; t < 53; ++t) {
        double sum = 0.0;
        for (int64_t c = 0; c < 16; ++c) sum += std::pow(tensor.At(g, t, c), 2);
        const double want = std::sqrt(sum);
        ASSERT_NEAR(norms[g * 53 + t], want, 1e-6 * want)
            << DTypeName(dtype) << " head " << g << " position " << t;
      }
    }
  }
}

TEST_F(RowOpsParity, NormBeyondFp32IsRefused) {
  KvTensor tensor = RandomKv(DType::kF32, Layout::kNhd, 16, 8);
  for (int64_t c = 0; c < 16; ++c) tensor.Set(2, 52, c, 3e38f);
  std::vector<float> norms;
  EXPECT_EQ(Norms(DeviceKv(tensor).view(), &norms).message(),
            "layer 1: v: head 2 position 52 has a norm beyond fp32");
}

TEST_F(RowOpsParity, FirstValueThatIsNotFiniteIsNamed) {
  KvTensor tensor = RandomKv(DType::kBF16, Layout::kPaged, 16, 8);
  tensor.Set(1, 30, 15, std::numeric_limits<float>::quiet_NaN());
  tensor.Set(1, 29, 3, std::numeric_limits<float>::infinity());
  std::vector<float> norms;
  EXPECT_EQ(Norms(DeviceKv(tensor).view(), &norms).message(),
            "layer 1: v: head 1 position 29 is not finite");
}

TEST_F(RowOpsParity, TileColumnsHaveTheBitsOfTheCpu) {
  std::mt19937 rng(fakes::TestSeed(3));
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    std::vector<float> values = RandomValues(rng, 4 * 6 * 300, dtype);
    for (float& value : values) value = std::fabs(value);
    const DenseTensor tile(values, 4, 6, 300, dtype);
    const DeviceDense device_tile(tile);
    for (const RowReduction reduction :
         {RowReduction::kMean, RowReduction::kSum, RowReduction::kMax, RowReduction::kLast}) {
      std::vector<float> got;
      std::vector<float> want;
      const std::vector<int64_t> positions = {3, 100, 295, 297, 298, 299};
      ASSERT_TRUE(Columns(cuda_, device_tile.tile(), positions, reduction, &got).ok());
      ASSERT_TRUE(Columns(cpu_, tile.tile(), positions, reduction, &want).ok());
      EXPECT_EQ(got, want);
    }
  }
}

TEST_F(RowOpsParity, TileColumnsOfListedHeadsHaveTheBitsOfTheCpu) {
  std::mt19937 rng(fakes::TestSeed(3));
  std::vector<float> values = RandomValues(rng, 4 * 6 * 300, DType::kF32);
  for (float& value : values) value = std::fabs(value);
  const DenseTensor tile(values, 4, 6, 300, DType::kF32);
  const std::vector<int64_t> positions = {3, 100, 295, 297, 298, 340};
  const std::vector<HeadRows> heads = {{0, 1, 4, RowReduction::kMean},
                                       {2, 0, 6, RowReduction::kLast},
                                       {2, 3, 3, RowReduction::kMax},
                                       {3, 0, 2, RowReduction::kSum}};
  const auto columns = [&](const Machine& machine) {
    TileArgs args;
    args.tile = tile.tile();
    args.row_positions = positions;
    args.what = "layer 2";
    args.heads = heads;
    const std::unique_ptr<ScoreBuffer> out = machine.Buffer(4, 300);
    const absl::Status status = machine.backend->TileColumns(*machine.context, args, *out);
    EXPECT_TRUE(status.ok()) << status;
    return machine.Values(*out);
  };
  EXPECT_EQ(columns(cuda_), columns(cpu_));
}

TEST_F(RowOpsParity, TileValueThatIsNegativeIsNamed) {
  DenseTensor tile(std::vector<float>(2 * 3 * 40, 0.1f), 2, 3, 40, DType::kF32);
  tile.Set(1, 2, 39, -0.5f);
  tile.Set(1, 0, 39, -0.5f);  // not seen by its row
  std::vector<float> columns;
  const absl::Status status =
      Columns(cuda_, tile.tile(), {37, 38, 39}, RowReduction::kMean, &columns);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(std::string(status.message()).substr(0, 51),
            "layer 2: attn_tile: head 1 row 2 position 39 is not");
}

TEST_F(RowOpsParity, GatherSharedSet) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int64_t gap : {8, 3}) {
      for (const int64_t head_dim : {8, 20, 128, 33}) {
        ExpectSameGather(RandomKv(dtype, Layout::kPaged, head_dim, gap),
                         PoisonedKv(dtype, Layout::kNhd, head_dim, gap, 7), {{0, 3, 15, 16, 52}});
      }
    }
  }
}

// More rows than a block has on their way at once; rows of 32 to 1280 bytes, in units of 16 to 2.
TEST_F(RowOpsParity, GatherManyRowsOfEverySize) {
  std::vector<int32_t> some;
  std::vector<int32_t> others;
  for (int32_t i = 0; i < 700; ++i) {
    if (i % 5 != 2) some.push_back(i);
    if (i % 7 == 3) others.push_back(i);
  }
  for (const int64_t head_dim : {16, 32, 64, 128, 256, 640}) {
    ExpectSameGather(RandomKv(DType::kBF16, Layout::kPaged, head_dim, 8, 700),
                     RandomKv(DType::kBF16, Layout::kNhd, head_dim, 8, 600), {some});
  }
  for (const int64_t head_dim : {60, 62, 61}) {
    ExpectSameGather(RandomKv(DType::kF16, Layout::kHnd, head_dim, 0, 700),
                     RandomKv(DType::kF16, Layout::kPaged, head_dim, 0, 600), {some, {}, others});
  }
}

TEST_F(RowOpsParity, GatherIntoPagedDestination) {
  std::vector<int32_t> everything(53);
  for (int32_t i = 0; i < 53; ++i) everything[i] = i;
  ExpectSameGather(RandomKv(DType::kF16, Layout::kNhd, 64, 8),
                   PoisonedKv(DType::kF16, Layout::kPaged, 64, 8, 53), {everything});
}

TEST_F(RowOpsParity, GatherSetPerHead) {
  ExpectSameGather(RandomKv(DType::kF16, Layout::kHnd, 16, 8),
                   PoisonedKv(DType::kF16, Layout::kHnd, 16, 8, 9),
                   {{1}, {}, {0, 9, 10, 11, 12, 13, 50, 51, 52}});
}

TEST_F(RowOpsParity, GatherRefusesAnIndexPastTheEnd) {
  const KvTensor in = RandomKv(DType::kF16, Layout::kNhd, 16, 8);
  KvTensor out = RandomKv(DType::kF16, Layout::kNhd, 16, 8, 9);
  const std::vector<int32_t> set = {0, 53};
  const std::vector<absl::Span<const int32_t>> sets = {set};
  EXPECT_EQ(cuda_.backend->GatherRows(*cuda_.context, in.view(), sets, out.mutable_view()),
            cpu_.backend->GatherRows(*cpu_.context, in.view(), sets, out.mutable_view()));
}

// Compacts device and host memory on the device, and a twin on the CPU; every byte is compared.
TEST_F(RowOpsParity, CompactRowsOfEveryLayout) {
  const Sets shared = {{0, 3, 15, 16, 17, 52}};
  const Sets ragged = {{1}, {}, {0, 9, 10, 11, 12, 13, 50, 51, 52}};
  for (const Sets& sets : {shared, ragged}) {
    const std::vector<absl::Span<const int32_t>> spans(sets.begin(), sets.end());
    for (const Layout layout : {Layout::kNhd, Layout::kHnd, Layout::kPaged}) {
      for (const int64_t head_dim : {8, 33}) {
        const KvTensor before = RandomKv(DType::kBF16, layout, head_dim, 3);
        KvTensor twin = before;
        ASSERT_TRUE(cpu_.backend->CompactRows(*cpu_.context, spans, twin.mutable_view()).ok());
        const DeviceKv device(before);
        const absl::Status status =
            cuda_.backend->CompactRows(*cuda_.context, spans, device.mutable_view());
        ASSERT_TRUE(status.ok()) << status;
        EXPECT_EQ(device.Read(), twin.bytes());
        KvTensor host = before;
        ASSERT_TRUE(cuda_.backend->CompactRows(*cuda_.context, spans, host.mutable_view()).ok());
        EXPECT_EQ(host.bytes(), twin.bytes());
      }
    }
  }
}

}  // namespace
}  // namespace keepset::kernels
