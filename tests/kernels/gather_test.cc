#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/compaction.h"
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

// What a gather into a fresh destination gives, and the rows behind it as they were.
void ExpectCompacted(const KvTensor& before, const std::vector<std::vector<int32_t>>& keep,
                     const KvTensor& after) {
  const KvView shape = before.view();
  for (int64_t g = 0; g < shape.num_kv_heads; ++g) {
    const std::vector<int32_t>& set = keep[keep.size() == 1 ? 0 : g];
    for (int64_t t = 0; t < shape.seq_len; ++t) {
      const int64_t from = t < static_cast<int64_t>(set.size()) ? set[t] : t;
      for (int64_t c = 0; c < shape.head_dim; ++c) {
        ASSERT_EQ(after.At(g, t, c), before.At(g, from, c)) << "head " << g << " row " << t;
      }
    }
  }
}

std::vector<Set> Spans(const std::vector<std::vector<int32_t>>& keep) {
  return {keep.begin(), keep.end()};
}

TEST(CompactRows, MovesTheKeptRowsToTheFrontInEveryLayout) {
  const std::vector<std::vector<int32_t>> shared = {{0, 3, 17, 50, 98, 99}};
  const std::vector<std::vector<int32_t>> ragged = {{1}, {}, {0, 1, 2, 40, 41, 99}};
  for (const auto& keep : {shared, ragged}) {
    for (const Layout layout : {Layout::kNhd, Layout::kHnd, Layout::kPaged}) {
      for (const DType dtype : {DType::kF32, DType::kBF16}) {
        for (const int num_threads : {1, 4}) {
          const KvTensor before = Source(layout, dtype);
          KvTensor after = before;
          BackendFixture fixture(num_threads);
          ASSERT_TRUE(fixture.backend()
                          .CompactRows(fixture.context(), Spans(keep), after.mutable_view())
                          .ok());
          ExpectCompacted(before, keep, after);
        }
      }
    }
  }
}

// The form of backends whose rows move in any order, here with more rows than fit the scratch.
TEST(CompactRows, ThroughScratchMemoryGivesTheSameBytes) {
  constexpr int64_t kLong = 9000;
  constexpr int64_t kWide = 640;
  std::mt19937 rng(7);
  const KvTensor before(RandomValues(rng, kLong * kWide, DType::kF32), 1, kLong, kWide, DType::kF32,
                        Layout::kPaged);
  std::vector<std::vector<int32_t>> keep(1);
  for (int32_t t = 0; t < kLong; ++t) {
    if (t % 7 != 3) keep[0].push_back(t);
  }
  BackendFixture fixture;
  KvTensor forward = before;
  KvTensor through_scratch = before;
  std::vector<std::byte> scratch(CompactionScratchBytes(Spans(keep), through_scratch.mutable_view(),
                                                        /*most_bytes=*/int64_t{4} << 20));
  ASSERT_LE(scratch.size(), size_t{4} << 20);
  ComputeBackend& backend = fixture.backend();
  ASSERT_TRUE(backend.CompactRows(fixture.context(), Spans(keep), forward.mutable_view()).ok());
  const auto gather = [&](const KvView& in, absl::Span<const Set> sets, const MutableKvView& out) {
    return backend.GatherRows(fixture.context(), in, sets, out);
  };
  ASSERT_TRUE(
      CompactThrough(gather, Spans(keep), through_scratch.mutable_view(), absl::MakeSpan(scratch))
          .ok());
  EXPECT_EQ(through_scratch.bytes(), forward.bytes());
}

TEST(CompactRows, BadSetIsRefusedBeforeAnythingMoves) {
  const std::vector<std::pair<std::vector<int32_t>, std::string>> cases = {
      {{5, 3}, "entry 1 is 3 after 5, want ascending"},
      {{5, 5}, "entry 1 is 5 after 5, want ascending"},
      {{5, 100}, "entry 1 is 100, want 0..99"},
      {{-1, 5}, "entry 0 is -1, want 0..99"}};
  for (const auto& [set, message] : cases) {
    const KvTensor before = Source(Layout::kHnd);
    KvTensor after = before;
    BackendFixture fixture;
    const absl::Status status =
        fixture.backend().CompactRows(fixture.context(), {Set(set)}, after.mutable_view());
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
    EXPECT_EQ(after.bytes(), before.bytes());
  }
}

TEST(CompactRows, BlockThatIsTwiceInTheTableIsRefused) {
  KvTensor pool = Source(Layout::kPaged);
  std::vector<int32_t> blocks(pool.view().block_table.begin(), pool.view().block_table.end());
  blocks[2] = blocks[0];
  MutableKvView x = pool.mutable_view();
  x.block_table = blocks;
  const std::vector<int32_t> keep = {5};
  BackendFixture fixture;
  const absl::Status status = fixture.backend().CompactRows(fixture.context(), {Set(keep)}, x);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("is in block_table twice"));
}

}  // namespace
}  // namespace keepset::kernels
