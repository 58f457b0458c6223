#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/compute_backend.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {
namespace {

using ::testing::HasSubstr;
using Set = absl::Span<const int32_t>;

constexpr int64_t kHeads = 3;
constexpr int64_t kTokens = 100;
constexpr int64_t kDim = 10;

KvTensor Source(Layout layout, DType dtype = DType::kF32) {
  std::mt19937 rng(11);
  return KvTensor(RandomValues(rng, kHeads * kTokens * kDim, dtype), kHeads, kTokens, kDim, dtype,
                  layout);
}

KvTensor Destination(int64_t capacity, Layout layout, DType dtype = DType::kF32) {
  return KvTensor(std::vector<float>(kHeads * capacity * kDim, -7.0f), kHeads, capacity, kDim,
                  dtype, layout, 8);
}

absl::Status Gather(const KvView& in, const std::vector<Set>& sets, const MutableKvView& out) {
  BackendFixture fixture;
  return fixture.backend().GatherRows(fixture.context(), in, sets, out);
}

TEST(GatherRows, CopiesTheRowsOfASharedSetBetweenAllLayouts) {
  const std::vector<int32_t> keep = {0, 3, 17, 50, 98, 99};
  for (Layout from : {Layout::kNhd, Layout::kHnd, Layout::kPaged}) {
    for (Layout to : {Layout::kNhd, Layout::kHnd, Layout::kPaged}) {
      for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
        const KvTensor in = Source(from, dtype);
        KvTensor out = Destination(9, to, dtype);
        ASSERT_TRUE(Gather(in.view(), {keep}, out.mutable_view()).ok());
        for (int64_t g = 0; g < kHeads; ++g) {
          for (int64_t i = 0; i < 9; ++i) {
            for (int64_t c = 0; c < kDim; ++c) {
              ASSERT_EQ(out.At(g, i, c), i < 6 ? in.At(g, keep[i], c) : -7.0f);
            }
          }
        }
      }
    }
  }
}

TEST(GatherRows, HeadsMayKeepSetsOfDifferentSizes) {
  const std::vector<std::vector<int32_t>> keep = {{1}, {}, {0, 2, 99}};
  const KvTensor in = Source(Layout::kPaged);
  KvTensor out = Destination(3, Layout::kHnd);
  ASSERT_TRUE(Gather(in.view(), {keep[0], keep[1], keep[2]}, out.mutable_view()).ok());
  for (int64_t g = 0; g < kHeads; ++g) {
    for (size_t i = 0; i < 3; ++i) {
      const float expected = i < keep[g].size() ? in.At(g, keep[g][i], 4) : -7.0f;
      EXPECT_EQ(out.At(g, static_cast<int64_t>(i), 4), expected);
    }
  }
}

TEST(GatherRows, KeepsEveryBitOfNanPayloads) {
  KvTensor in = Source(Layout::kHnd);
  const uint32_t bits = 0x7fa12345u;
  std::memcpy(in.mutable_view().data, &bits, sizeof(bits));
  KvTensor out = Destination(1, Layout::kHnd);
  const std::vector<int32_t> keep = {0};
  ASSERT_TRUE(Gather(in.view(), {keep}, out.mutable_view()).ok());
  EXPECT_EQ(std::memcmp(out.bytes().data(), &bits, sizeof(bits)), 0);
}

TEST(GatherRows, BlocksOfOnePoolMayBeSourceAndDestination) {
  KvTensor pool = Source(Layout::kPaged);
  const KvView whole = pool.view();
  const std::vector<int32_t> source_blocks = {whole.block_table[0], whole.block_table[1]};
  const std::vector<int32_t> destination_blocks = {whole.block_table[3]};
  KvView in = whole;
  in.block_table = source_blocks;
  in.seq_len = 32;
  MutableKvView out = pool.mutable_view();
  out.block_table = destination_blocks;
  out.seq_len = 16;
  const float expected = pool.At(2, 31, 9);
  const std::vector<int32_t> keep = {5, 31};
  ASSERT_TRUE(Gather(in, {keep}, out).ok());
  EXPECT_EQ(pool.At(2, 3 * 16 + 1, 9), expected);
}

TEST(GatherRows, SharedBlockIsRefused) {
  KvTensor pool = Source(Layout::kPaged);
  const std::vector<int32_t> blocks = {pool.view().block_table[2]};
  MutableKvView out = pool.mutable_view();
  out.block_table = blocks;
  out.seq_len = 16;
  const std::vector<int32_t> keep = {5};
  const absl::Status status = Gather(pool.view(), {keep}, out);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("overlap"));
}

TEST(GatherRows, InPlaceIsRefused) {
  KvTensor tensor = Source(Layout::kNhd);
  const std::vector<int32_t> keep = {5};
  EXPECT_EQ(Gather(tensor.view(), {keep}, tensor.mutable_view()).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(GatherRows, PositionOutsideTheSourceIsRefused) {
  const KvTensor in = Source(Layout::kHnd);
  KvTensor out = Destination(4, Layout::kHnd);
  for (int32_t bad : {-1, static_cast<int32_t>(kTokens)}) {
    const std::vector<int32_t> keep = {0, bad};
    const absl::Status status = Gather(in.view(), {keep}, out.mutable_view());
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(GatherRows, DestinationTooSmallIsRefused) {
  const KvTensor in = Source(Layout::kHnd);
  KvTensor out = Destination(1, Layout::kHnd);
  const std::vector<int32_t> keep = {0, 1};
  const absl::Status status = Gather(in.view(), {keep}, out.mutable_view());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("capacity 1"));
}

TEST(GatherRows, OtherTypeOrShapeIsRefused) {
  const KvTensor in = Source(Layout::kHnd);
  const std::vector<int32_t> keep = {0};
  KvTensor half = Destination(4, Layout::kHnd, DType::kF16);
  EXPECT_EQ(Gather(in.view(), {keep}, half.mutable_view()).code(),
            absl::StatusCode::kInvalidArgument);
  KvTensor out = Destination(4, Layout::kHnd);
  MutableKvView narrow = out.mutable_view();
  narrow.head_dim = kDim - 1;
  EXPECT_EQ(Gather(in.view(), {keep}, narrow).code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace keepset::kernels
