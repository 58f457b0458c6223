#include "kernels/views.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"

namespace keepset::kernels {
namespace {

bool IsKnown(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16;
}

absl::Status CheckBase(const std::byte* data, int64_t size_bytes, DType dtype,
                       absl::string_view what) {
  if (data == nullptr) return absl::InvalidArgumentError(absl::StrCat(what, ": data is null"));
  if (!IsKnown(dtype)) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": dtype=", static_cast<int>(dtype),
                                                   ", want 1 (f32), 2 (f16) or 3 (bf16)"));
  }
  if (size_bytes < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": size_bytes=", size_bytes, ", want >= 0"));
  }
  if (reinterpret_cast<uintptr_t>(data) % DTypeBytes(dtype) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        what, ": data is not aligned to the ", DTypeBytes(dtype), " bytes of ", DTypeName(dtype)));
  }
  return absl::OkStatus();
}

absl::Status CheckPositive(int64_t value, absl::string_view name, absl::string_view what) {
  if (value >= 1) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, ": ", name, "=", value, ", want >= 1"));
}

// A stride over a dimension of one entry is never applied and may be anything >= 0.
absl::Status CheckStride(int64_t stride, int64_t count, int64_t inner, absl::string_view name,
                         absl::string_view what) {
  const int64_t least = count > 1 ? inner : 0;
  if (stride >= least) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what, ": ", name, "=", stride, ", want >= ", least));
}

// One dimension of an element address.
struct Level {
  int64_t count;
  int64_t stride;
};

// Elements from the first to the last one inclusive; false on overflow.
bool Extent(const Level* levels, int num_levels, int64_t inner, int64_t* extent) {
  int64_t total = inner;
  for (int i = 0; i < num_levels; ++i) {
    int64_t reach = 0;
    if (__builtin_mul_overflow(levels[i].count - 1, levels[i].stride, &reach)) return false;
    if (__builtin_add_overflow(total, reach, &total)) return false;
  }
  *extent = total;
  return true;
}

absl::Status CheckExtent(const Level* levels, int num_levels, int64_t inner, int64_t size_bytes,
                         DType dtype, absl::string_view what) {
  const int64_t limit = size_bytes / DTypeBytes(dtype);
  int64_t extent = 0;
  if (!Extent(levels, num_levels, inner, &extent)) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": dimensions times strides overflow 64 bits, want at most ", limit,
                     " elements (size_bytes=", size_bytes, ")"));
  }
  if (extent > limit) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": strides reach element ", extent - 1,
                                                   ", want < ", limit, " (size_bytes=", size_bytes,
                                                   ")"));
  }
  return absl::OkStatus();
}

template <typename View>
absl::Status CheckKvCommon(const View& view, absl::string_view what) {
  KEEPSET_RETURN_IF_ERROR(CheckBase(view.data, view.size_bytes, view.dtype, what));
  KEEPSET_RETURN_IF_ERROR(CheckPositive(view.num_kv_heads, "num_kv_heads", what));
  KEEPSET_RETURN_IF_ERROR(CheckPositive(view.seq_len, "seq_len", what));
  KEEPSET_RETURN_IF_ERROR(CheckPositive(view.head_dim, "head_dim", what));
  if (view.block_size < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": block_size=", view.block_size, ", want >= 0 (0 is contiguous)"));
  }
  const int64_t tokens =
      view.block_size > 0 ? std::min(view.block_size, view.seq_len) : view.seq_len;
  KEEPSET_RETURN_IF_ERROR(
      CheckStride(view.head_stride, view.num_kv_heads, view.head_dim, "head_stride", what));
  KEEPSET_RETURN_IF_ERROR(
      CheckStride(view.token_stride, tokens, view.head_dim, "token_stride", what));
  if (view.block_size == 0) {
    if (!view.block_table.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(what, ": block_table has ",
                                                     view.block_table.size(),
                                                     " entries with block_size=0, want 0"));
    }
    const Level levels[] = {{view.num_kv_heads, view.head_stride}, {tokens, view.token_stride}};
    return CheckExtent(levels, 2, view.head_dim, view.size_bytes, view.dtype, what);
  }

  const int64_t num_blocks =
      view.seq_len / view.block_size + (view.seq_len % view.block_size != 0 ? 1 : 0);
  if (static_cast<int64_t>(view.block_table.size()) != num_blocks) {
    return absl::InvalidArgumentError(absl::StrCat(
        what, ": block_table has ", view.block_table.size(), " entries, want ", num_blocks,
        " for seq_len=", view.seq_len, " and block_size=", view.block_size));
  }
  KEEPSET_RETURN_IF_ERROR(
      CheckStride(view.block_stride, num_blocks, view.head_dim, "block_stride", what));
  const int64_t limit = view.size_bytes / DTypeBytes(view.dtype);
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int64_t id = view.block_table[i];
    if (id < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": block_table[", i, "]=", id, ", want >= 0"));
    }
    const int64_t used = std::min(view.block_size, view.seq_len - i * view.block_size);
    const Level levels[] = {{id + 1, view.block_stride},
                            {view.num_kv_heads, view.head_stride},
                            {used, view.token_stride}};
    int64_t extent = 0;
    if (Extent(levels, 3, view.head_dim, &extent) && extent <= limit) continue;
    return CheckExtent(levels, 3, view.head_dim, view.size_bytes, view.dtype,
                       absl::StrCat(what, ": block_table[", i, "]=", id));
  }
  return absl::OkStatus();
}

}  // namespace

absl::string_view DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kF16:
      return "f16";
    case DType::kBF16:
      return "bf16";
  }
  return "unknown";
}

KvView Readable(const MutableKvView& view) {
  KvView readable;
  readable.data = view.data;
  readable.size_bytes = view.size_bytes;
  readable.dtype = view.dtype;
  readable.num_kv_heads = view.num_kv_heads;
  readable.seq_len = view.seq_len;
  readable.head_dim = view.head_dim;
  readable.head_stride = view.head_stride;
  readable.token_stride = view.token_stride;
  readable.block_size = view.block_size;
  readable.block_stride = view.block_stride;
  readable.block_table = view.block_table;
  return readable;
}

absl::Status ValidateView(const KvView& view, absl::string_view what) {
  return CheckKvCommon(view, what);
}

absl::Status ValidateView(const MutableKvView& view, absl::string_view what) {
  KEEPSET_RETURN_IF_ERROR(CheckKvCommon(view, what));
  // Two rows that share an element would be written by two threads.
  int64_t num_levels = 2;
  Level levels[3] = {{view.num_kv_heads, view.head_stride},
                     {view.block_size > 0 ? std::min(view.block_size, view.seq_len) : view.seq_len,
                      view.token_stride},
                     {0, 0}};
  if (view.block_table.size() > 1) {
    std::vector<int32_t> ids(view.block_table.begin(), view.block_table.end());
    std::sort(ids.begin(), ids.end());
    const auto twice = std::adjacent_find(ids.begin(), ids.end());
    if (twice != ids.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": block ", *twice, " is in block_table twice, want once"));
    }
    levels[num_levels++] = {int64_t{ids.back()} + 1, view.block_stride};
  }
  std::sort(levels, levels + num_levels,
            [](const Level& a, const Level& b) { return a.stride < b.stride; });
  int64_t extent = view.head_dim;
  for (int i = 0; i < num_levels; ++i) {
    if (levels[i].count <= 1) continue;
    if (levels[i].stride < extent) {
      return absl::InvalidArgumentError(absl::StrCat(what, ": rows overlap: a stride of ",
                                                     levels[i].stride, ", want >= ", extent));
    }
    extent += (levels[i].count - 1) * levels[i].stride;
  }
  return absl::OkStatus();
}

absl::Status ValidateView(const QueryView& view, absl::string_view what) {
  KEEPSET_RETURN_IF_ERROR(CheckBase(view.data, view.size_bytes, view.dtype, what));
  KEEPSET_RETURN_IF_ERROR(CheckPositive(view.num_qo_heads, "num_qo_heads", what));
  KEEPSET_RETURN_IF_ERROR(CheckPositive(view.num_rows, "num_rows", what));
  KEEPSET_RETURN_IF_ERROR(CheckPositive(view.head_dim, "head_dim", what));
  KEEPSET_RETURN_IF_ERROR(
      CheckStride(view.head_stride, view.num_qo_heads, view.head_dim, "head_stride", what));
  KEEPSET_RETURN_IF_ERROR(
      CheckStride(view.row_stride, view.num_rows, view.head_dim, "row_stride", what));
  const Level levels[] = {{view.num_qo_heads, view.head_stride}, {view.num_rows, view.row_stride}};
  return CheckExtent(levels, 2, view.head_dim, view.size_bytes, view.dtype, what);
}

absl::Status ValidateView(const TileView& view, absl::string_view what) {
  KEEPSET_RETURN_IF_ERROR(CheckBase(view.data, view.size_bytes, view.dtype, what));
  KEEPSET_RETURN_IF_ERROR(CheckPositive(view.num_qo_heads, "num_qo_heads", what));
  KEEPSET_RETURN_IF_ERROR(CheckPositive(view.num_rows, "num_rows", what));
  KEEPSET_RETURN_IF_ERROR(CheckPositive(view.seq_len, "seq_len", what));
  KEEPSET_RETURN_IF_ERROR(
      CheckStride(view.head_stride, view.num_qo_heads, view.seq_len, "head_stride", what));
  KEEPSET_RETURN_IF_ERROR(
      CheckStride(view.row_stride, view.num_rows, view.seq_len, "row_stride", what));
  const Level levels[] = {{view.num_qo_heads, view.head_stride}, {view.num_rows, view.row_stride}};
  return CheckExtent(levels, 2, view.seq_len, view.size_bytes, view.dtype, what);
}

absl::Status ValidateView(const ColumnsView& view, absl::string_view what) {
  KEEPSET_RETURN_IF_ERROR(CheckBase(view.data, view.size_bytes, view.dtype, what));
  KEEPSET_RETURN_IF_ERROR(CheckPositive(view.num_qo_heads, "num_qo_heads", what));
  KEEPSET_RETURN_IF_ERROR(CheckPositive(view.seq_len, "seq_len", what));
  KEEPSET_RETURN_IF_ERROR(
      CheckStride(view.head_stride, view.num_qo_heads, view.seq_len, "head_stride", what));
  const Level levels[] = {{view.num_qo_heads, view.head_stride}};
  return CheckExtent(levels, 1, view.seq_len, view.size_bytes, view.dtype, what);
}

absl::Status ValidateView(const LseView& view, absl::string_view what) {
  KEEPSET_RETURN_IF_ERROR(CheckBase(view.data, view.size_bytes, view.dtype, what));
  KEEPSET_RETURN_IF_ERROR(CheckPositive(view.num_qo_heads, "num_qo_heads", what));
  KEEPSET_RETURN_IF_ERROR(CheckPositive(view.num_rows, "num_rows", what));
  KEEPSET_RETURN_IF_ERROR(
      CheckStride(view.head_stride, view.num_qo_heads, view.num_rows, "head_stride", what));
  const Level levels[] = {{view.num_qo_heads, view.head_stride}};
  return CheckExtent(levels, 1, view.num_rows, view.size_bytes, view.dtype, what);
}

}  // namespace keepset::kernels
