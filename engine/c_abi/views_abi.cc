// keepset.h: the caller's tensors as views.
#include <cstddef>
#include <string>

#include "absl/types/span.h"
#include "base/status_macros.h"
#include "engine/c_abi/handles.h"

namespace keepset::engine {
namespace {

constexpr int64_t kMaxBlocks = int64_t{1} << 32;

// The fields that KvView and MutableKvView share.
template <typename View>
absl::Status FillKv(const keepset_kv_view& from, absl::string_view what, View& to) {
  KEEPSET_ASSIGN_OR_RETURN(to.dtype, ToDType(from.dtype, what));
  to.size_bytes = from.size_bytes;
  to.num_kv_heads = from.num_kv_heads;
  to.seq_len = from.seq_len;
  to.head_dim = from.head_dim;
  to.head_stride = from.head_stride;
  to.token_stride = from.token_stride;
  to.block_size = from.block_size;
  to.block_stride = from.block_stride;
  if (from.block_size > 0) {
    if (from.block_table == nullptr || from.num_blocks < 0 || from.num_blocks > kMaxBlocks) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": block_size=", from.block_size, " with num_blocks=", from.num_blocks,
                       " and ", from.block_table == nullptr ? "no block_table" : "a block_table",
                       ", want a block_table of num_blocks entries"));
    }
    to.block_table = absl::MakeConstSpan(from.block_table, static_cast<size_t>(from.num_blocks));
  }
  return absl::OkStatus();
}

absl::Status CheckLastDim(const keepset_rows_view& view, int64_t want, absl::string_view what) {
  if (view.last_dim == want) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what, ": last_dim=", view.last_dim, ", want ", want));
}

absl::Status FillColumns(const keepset_layer_observation& observation, absl::string_view what,
                         LayerObservation& to) {
  const keepset_rows_view& from = observation.column_stats;
  if (from.num_rows != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": num_rows=", from.num_rows, ", want 1: one value per column"));
  }
  switch (observation.column_reduction) {
    case KEEPSET_COLUMN_MEAN:
      to.column_reduction = ColumnReduction::kMean;
      break;
    case KEEPSET_COLUMN_SUM:
      to.column_reduction = ColumnReduction::kSum;
      break;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": column_reduction=", observation.column_reduction,
                       ", want KEEPSET_COLUMN_MEAN (1) or KEEPSET_COLUMN_SUM (2)"));
  }
  kernels::ColumnsView& columns = to.column_stats;
  columns.data = static_cast<const std::byte*>(from.data);
  columns.size_bytes = from.size_bytes;
  KEEPSET_ASSIGN_OR_RETURN(columns.dtype, ToDType(from.dtype, what));
  columns.num_qo_heads = from.num_qo_heads;
  columns.seq_len = from.last_dim;
  columns.head_stride = from.head_stride;
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<kernels::DType> ToDType(int32_t dtype, absl::string_view what) {
  switch (dtype) {
    case KEEPSET_F32:
      return kernels::DType::kF32;
    case KEEPSET_F16:
      return kernels::DType::kF16;
    case KEEPSET_BF16:
      return kernels::DType::kBF16;
    default:
      return absl::InvalidArgumentError(absl::StrCat(
          what, ": dtype=", dtype, ", want KEEPSET_F32 (1), KEEPSET_F16 (2) or KEEPSET_BF16 (3)"));
  }
}

absl::StatusOr<kernels::KvView> ToKvView(const keepset_kv_view& view, absl::string_view what) {
  kernels::KvView to;
  if (view.data == nullptr) return to;
  to.data = static_cast<const std::byte*>(view.data);
  KEEPSET_RETURN_IF_ERROR(FillKv(view, what, to));
  return to;
}

absl::StatusOr<kernels::MutableKvView> ToMutableKvView(const keepset_kv_view& view,
                                                       absl::string_view what) {
  kernels::MutableKvView to;
  if (view.data == nullptr) return to;
  to.data = static_cast<std::byte*>(view.data);
  KEEPSET_RETURN_IF_ERROR(FillKv(view, what, to));
  return to;
}

absl::StatusOr<LayerObservation> ToObservation(const keepset_layer_observation& observation,
                                               int64_t layer) {
  const std::string where = absl::StrCat("layer ", layer, ": ");
  LayerObservation to;
  if (observation.q_window.data != nullptr) {
    const keepset_rows_view& from = observation.q_window;
    kernels::QueryView& q = to.q_window;
    q.data = static_cast<const std::byte*>(from.data);
    q.size_bytes = from.size_bytes;
    KEEPSET_ASSIGN_OR_RETURN(q.dtype, ToDType(from.dtype, absl::StrCat(where, "q_window")));
    q.num_qo_heads = from.num_qo_heads;
    q.num_rows = from.num_rows;
    q.head_dim = from.last_dim;
    q.head_stride = from.head_stride;
    q.row_stride = from.row_stride;
  }
  if (observation.window_lse.data != nullptr) {
    const keepset_rows_view& from = observation.window_lse;
    const std::string what = absl::StrCat(where, "window_lse");
    kernels::LseView& lse = to.window_lse;
    lse.data = static_cast<const std::byte*>(from.data);
    lse.size_bytes = from.size_bytes;
    KEEPSET_ASSIGN_OR_RETURN(lse.dtype, ToDType(from.dtype, what));
    KEEPSET_RETURN_IF_ERROR(CheckLastDim(from, 1, what));
    if (from.row_stride != 1 && from.num_rows > 1) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": row_stride=", from.row_stride, ", want 1"));
    }
    lse.num_qo_heads = from.num_qo_heads;
    lse.num_rows = from.num_rows;
    lse.head_stride = from.head_stride;
    // Callers that were built without the field mean base e.
    const int32_t base = observation.struct_size >= offsetof(keepset_layer_observation, qo_heads)
                             ? observation.lse_base
                             : KEEPSET_LSE_BASE_E;
    if (base != KEEPSET_LSE_BASE_E && base != KEEPSET_LSE_BASE_2) {
      return absl::InvalidArgumentError(absl::StrCat(
          what, ": lse_base=", base, ", want KEEPSET_LSE_BASE_E (0) or KEEPSET_LSE_BASE_2 (1)"));
    }
    lse.base = base == KEEPSET_LSE_BASE_2 ? kernels::LogBase::kTwo : kernels::LogBase::kE;
  }
  if (observation.attn_tile.data != nullptr) {
    const keepset_rows_view& from = observation.attn_tile;
    kernels::TileView& tile = to.attn_tile;
    tile.data = static_cast<const std::byte*>(from.data);
    tile.size_bytes = from.size_bytes;
    KEEPSET_ASSIGN_OR_RETURN(tile.dtype, ToDType(from.dtype, absl::StrCat(where, "attn_tile")));
    tile.num_qo_heads = from.num_qo_heads;
    tile.num_rows = from.num_rows;
    tile.seq_len = from.last_dim;
    tile.head_stride = from.head_stride;
    tile.row_stride = from.row_stride;
  }
  if (observation.struct_size >= sizeof(observation) && observation.qo_heads != nullptr) {
    const keepset_rows_view& listed =
        observation.attn_tile.data != nullptr ? observation.attn_tile : observation.q_window;
    if (listed.num_qo_heads < 1) {
      return absl::InvalidArgumentError(absl::StrCat(where,
                                                     "qo_heads: num_qo_heads=", listed.num_qo_heads,
                                                     " of q_window or attn_tile, want at least 1"));
    }
    to.qo_heads = absl::MakeConstSpan(observation.qo_heads, listed.num_qo_heads);
  }
  if (observation.struct_size >= offsetof(keepset_layer_observation, qo_heads) &&
      observation.column_stats.data != nullptr) {
    KEEPSET_RETURN_IF_ERROR(FillColumns(observation, absl::StrCat(where, "column_stats"), to));
  }
  KEEPSET_ASSIGN_OR_RETURN(to.k, ToKvView(observation.k, absl::StrCat(where, "k")));
  KEEPSET_ASSIGN_OR_RETURN(to.v, ToKvView(observation.v, absl::StrCat(where, "v")));
  return to;
}

}  // namespace keepset::engine
