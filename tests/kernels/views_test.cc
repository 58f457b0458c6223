#include "kernels/views.h"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace keepset::kernels {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max() / 2;

std::byte* Memory() {
  alignas(8) static std::byte memory[4096];
  return memory;
}

KvView Dense() {
  KvView view;
  view.data = Memory();
  view.size_bytes = 2 * 8 * 16 * 4;
  view.num_kv_heads = 2;
  view.seq_len = 8;
  view.head_dim = 16;
  view.head_stride = 8 * 16;
  view.token_stride = 16;
  return view;
}

KvView Paged(const std::vector<int32_t>& block_table) {
  KvView view;
  view.data = Memory();
  view.size_bytes = 4 * 4 * 2 * 16 * 2;
  view.dtype = DType::kBF16;
  view.num_kv_heads = 2;
  view.seq_len = 10;
  view.head_dim = 16;
  view.head_stride = 16;
  view.token_stride = 32;
  view.block_size = 4;
  view.block_stride = 128;
  view.block_table = block_table;
  return view;
}

MutableKvView Mutable(const KvView& from) {
  MutableKvView view;
  view.data = Memory();
  view.size_bytes = from.size_bytes;
  view.dtype = from.dtype;
  view.num_kv_heads = from.num_kv_heads;
  view.seq_len = from.seq_len;
  view.head_dim = from.head_dim;
  view.head_stride = from.head_stride;
  view.token_stride = from.token_stride;
  view.block_size = from.block_size;
  view.block_stride = from.block_stride;
  view.block_table = from.block_table;
  return view;
}

template <typename View>
std::string Refusal(const View& view) {
  const absl::Status status = ValidateView(view, "layer 3: k");
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer 3: k: "));
  return std::string(status.message());
}

TEST(ValidateView, AcceptsExactlyFittingTensors) {
  EXPECT_TRUE(ValidateView(Dense(), "k").ok());
  const std::vector<int32_t> table = {3, 0, 2};
  EXPECT_TRUE(ValidateView(Paged(table), "k").ok());
  EXPECT_TRUE(ValidateView(Mutable(Dense()), "k").ok());
  EXPECT_TRUE(ValidateView(Mutable(Paged(table)), "k").ok());
}

TEST(ValidateView, OneByteTooFewIsRefused) {
  KvView view = Dense();
  view.size_bytes -= 1;
  EXPECT_THAT(Refusal(view), HasSubstr("element 255, want < 255"));
}

TEST(ValidateView, LastBlockNeedsItsUsedRowsOnly) {
  const std::vector<int32_t> table = {0, 1, 3};
  KvView view = Paged(table);
  view.size_bytes = (3 * 128 + 2 * 32) * 2;
  EXPECT_TRUE(ValidateView(view, "k").ok());
  view.size_bytes -= 2;
  EXPECT_THAT(Refusal(view), HasSubstr("block_table[2]=3"));
}

TEST(ValidateView, BlockIdOutOfBoundsIsRefused) {
  for (int32_t bad : {-1, 4, std::numeric_limits<int32_t>::max()}) {
    const std::vector<int32_t> table = {0, bad, 1};
    EXPECT_THAT(Refusal(Paged(table)), HasSubstr("block_table[1]="));
  }
}

TEST(ValidateView, BlockTableOfAnotherLengthIsRefused) {
  const std::vector<int32_t> table = {0, 1};
  EXPECT_THAT(Refusal(Paged(table)), HasSubstr("block_table has 2 entries, want 3"));
}

TEST(ValidateView, BlockTableWithoutBlocksIsRefused) {
  const std::vector<int32_t> table = {0};
  KvView view = Dense();
  view.block_table = table;
  Refusal(view);
}

TEST(ValidateView, OverflowingStridesAreRefused) {
  for (int64_t KvView::*field : {&KvView::head_stride, &KvView::token_stride, &KvView::seq_len,
                                 &KvView::num_kv_heads, &KvView::head_dim}) {
    KvView view = Dense();
    view.*field = kHuge;
    Refusal(view);
  }
  const std::vector<int32_t> table = {0, 1, 2};
  KvView paged = Paged(table);
  paged.block_stride = kHuge;
  Refusal(paged);
}

TEST(ValidateView, NonPositiveFieldsAreRefused) {
  for (int64_t KvView::*field : {&KvView::head_stride, &KvView::token_stride, &KvView::seq_len,
                                 &KvView::num_kv_heads, &KvView::head_dim}) {
    for (int64_t bad : {int64_t{0}, int64_t{-1}, std::numeric_limits<int64_t>::min()}) {
      KvView view = Dense();
      view.*field = bad;
      Refusal(view);
    }
  }
  KvView view = Dense();
  view.size_bytes = -1;
  Refusal(view);
  view = Dense();
  view.block_size = -4;
  Refusal(view);
}

TEST(ValidateView, MisalignedDataIsRefused) {
  KvView view = Dense();
  view.data = Memory() + 2;
  EXPECT_THAT(Refusal(view), HasSubstr("aligned"));
}

TEST(ValidateView, NullDataIsRefused) {
  KvView view = Dense();
  view.data = nullptr;
  Refusal(view);
}

TEST(ValidateView, UnknownTypeIsRefused) {
  KvView view = Dense();
  view.dtype = static_cast<DType>(9);
  EXPECT_THAT(Refusal(view), HasSubstr("dtype=9"));
}

TEST(ValidateView, WritableRowsThatOverlapAreRefused) {
  MutableKvView view = Mutable(Dense());
  view.head_stride = 16;
  EXPECT_THAT(Refusal(view), HasSubstr("overlap"));
}

TEST(ValidateView, WritableBlockUsedTwiceIsRefused) {
  const std::vector<int32_t> table = {0, 1, 0};
  EXPECT_TRUE(ValidateView(Paged(table), "k").ok());
  EXPECT_THAT(Refusal(Mutable(Paged(table))), HasSubstr("block 0 is in block_table twice"));
}

TEST(ValidateView, QueriesTileAndLogSumExpAreChecked) {
  QueryView q;
  q.data = Memory();
  q.size_bytes = 4 * 6 * 2 * 4;
  q.num_qo_heads = 4;
  q.num_rows = 6;
  q.head_dim = 2;
  q.head_stride = 12;
  q.row_stride = 2;
  EXPECT_TRUE(ValidateView(q, "q").ok());
  q.size_bytes -= 4;
  Refusal(q);

  TileView tile;
  tile.data = Memory();
  tile.size_bytes = 4 * 6 * 2 * 4;
  tile.num_qo_heads = 4;
  tile.num_rows = 6;
  tile.seq_len = 2;
  tile.head_stride = 12;
  tile.row_stride = 2;
  EXPECT_TRUE(ValidateView(tile, "tile").ok());
  tile.row_stride = kHuge;
  Refusal(tile);

  LseView lse;
  lse.data = Memory();
  lse.size_bytes = 4 * 6 * 4;
  lse.num_qo_heads = 4;
  lse.num_rows = 6;
  lse.head_stride = 6;
  EXPECT_TRUE(ValidateView(lse, "lse").ok());
  lse.head_stride = 5;
  Refusal(lse);
}

}  // namespace
}  // namespace keepset::kernels
