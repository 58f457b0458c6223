#include "engine/policies/window_columns.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace keepset::engine {
namespace {

// Moves the start of a view by `rows` rows of `row_stride` elements.
template <typename View>
View SkipRows(View view, int64_t rows, int64_t row_stride) {
  const int64_t bytes = rows * row_stride * kernels::DTypeBytes(view.dtype);
  view.data += bytes;
  view.size_bytes -= bytes;
  view.num_rows -= rows;
  return view;
}

// The tile of one row that column statistics are.
kernels::TileArgs StatisticsArgs(const kernels::ColumnsView& columns, ColumnReduction reduction,
                                 absl::Span<const int64_t> row_positions) {
  kernels::TileArgs args;
  args.tile.data = columns.data;
  args.tile.size_bytes = columns.size_bytes;
  args.tile.dtype = columns.dtype;
  args.tile.num_qo_heads = columns.num_qo_heads;
  args.tile.num_rows = 1;
  args.tile.seq_len = columns.seq_len;
  args.tile.head_stride = columns.head_stride;
  args.tile.row_stride = columns.seq_len;
  args.row_positions = row_positions.last(1);
  args.mean_rows =
      reduction == ColumnReduction::kSum ? static_cast<int64_t>(row_positions.size()) : 1;
  args.tensor = "column_stats";
  return args;
}

}  // namespace

absl::Status WindowColumnMeans(PolicyContext& context, int64_t layer,
                               const LayerObservation& observation, int64_t num_rows,
                               kernels::ScoreBuffer& columns, kernels::ScoreBuffer* value_norms) {
  const int64_t skipped = static_cast<int64_t>(context.row_positions.size()) - num_rows;
  const absl::Span<const int64_t> row_positions = context.row_positions.subspan(skipped);
  const std::string what = absl::StrCat("layer ", layer);
  if (observation.attn_tile.present() || observation.column_stats.present()) {
    kernels::TileArgs args;
    if (observation.column_stats.present()) {
      args = StatisticsArgs(observation.column_stats, observation.column_reduction, row_positions);
    } else {
      args.tile = SkipRows(observation.attn_tile, skipped, observation.attn_tile.row_stride);
      args.row_positions = row_positions;
    }
    args.what = what;
    absl::Status status = context.backend.TileColumns(context.op_context, args, columns);
    if (!status.ok() || value_norms == nullptr) return status;
    return context.backend.RowNorms(context.op_context, observation.v, absl::StrCat(what, ": v"),
                                    *value_norms);
  }
  kernels::WindowArgs args;
  args.q = SkipRows(observation.q_window, skipped, observation.q_window.row_stride);
  args.k = observation.k;
  args.row_positions = row_positions;
  if (observation.window_lse.present()) {
    args.window_lse = SkipRows(observation.window_lse, skipped, 1);
  }
  args.softmax_scale = context.spec.softmax_scale;
  args.what = what;
  args.v = observation.v;
  args.value_norms = value_norms;
  return context.backend.WindowColumns(context.op_context, args, columns);
}

}  // namespace keepset::engine
