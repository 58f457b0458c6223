#include "engine/policies/window_columns.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

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

absl::Status WindowStage::Begin(const PolicyContext& context, int64_t num_rows,
                                ValueNorms value_norms) {
  num_rows_ = num_rows;
  wanted_ = value_norms;
  return Reserve(context, 1);
}

absl::Status WindowStage::Reserve(const PolicyContext& context, size_t num_layers) {
  const OperationSpec& spec = context.spec;
  while (buffers_.size() < num_layers) {
    Buffers fresh;
    KEEPSET_ASSIGN_OR_RETURN(fresh.columns,
                             context.backend.NewBuffer(spec.model.num_qo_heads, spec.seq_len));
    if (wanted_ == ValueNorms::kWanted) {
      KEEPSET_ASSIGN_OR_RETURN(fresh.value_norms,
                               context.backend.NewBuffer(spec.model.num_kv_heads, spec.seq_len));
    }
    buffers_.push_back(std::move(fresh));
  }
  return absl::OkStatus();
}

absl::Status WindowStage::RunTile(PolicyContext& context, const ObservedLayer& layer,
                                  const Buffers& buffers) {
  const LayerObservation& observation = layer.observation;
  const int64_t skipped = static_cast<int64_t>(context.row_positions.size()) - num_rows_;
  const std::string what = absl::StrCat("layer ", layer.layer);
  const absl::Span<const int64_t> row_positions = context.row_positions.subspan(skipped);
  kernels::TileArgs args;
  if (observation.column_stats.present()) {
    args = StatisticsArgs(observation.column_stats, observation.column_reduction, row_positions);
  } else {
    args.tile = SkipRows(observation.attn_tile, skipped, observation.attn_tile.row_stride);
    args.row_positions = row_positions;
  }
  args.what = what;
  KEEPSET_RETURN_IF_ERROR(context.backend.TileColumns(context.op_context, args, *buffers.columns));
  if (buffers.value_norms == nullptr) return absl::OkStatus();
  return context.backend.RowNorms(context.op_context, observation.v, absl::StrCat(what, ": v"),
                                  *buffers.value_norms);
}

absl::Status WindowStage::Run(PolicyContext& context, absl::Span<const ObservedLayer> layers) {
  KEEPSET_RETURN_IF_ERROR(Reserve(context, layers.size()));
  const int64_t skipped = static_cast<int64_t>(context.row_positions.size()) - num_rows_;
  std::vector<std::string> names(layers.size());
  std::vector<kernels::WindowArgs> windows;
  std::vector<kernels::ScoreBuffer*> outs;
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerObservation& observation = layers[i].observation;
    if (observation.attn_tile.present() || observation.column_stats.present()) {
      KEEPSET_RETURN_IF_ERROR(RunTile(context, layers[i], buffers_[i]));
      continue;
    }
    names[i] = absl::StrCat("layer ", layers[i].layer);
    kernels::WindowArgs& args = windows.emplace_back();
    args.q = SkipRows(observation.q_window, skipped, observation.q_window.row_stride);
    args.k = observation.k;
    args.row_positions = context.row_positions.subspan(skipped);
    if (observation.window_lse.present()) {
      args.window_lse = SkipRows(observation.window_lse, skipped, 1);
    }
    args.softmax_scale = context.spec.softmax_scale;
    args.what = names[i];
    args.v = observation.v;
    args.value_norms = buffers_[i].value_norms.get();
    outs.push_back(buffers_[i].columns.get());
  }
  if (windows.empty()) return absl::OkStatus();
  return context.backend.WindowColumnsOfLayers(context.op_context, windows, outs);
}

}  // namespace keepset::engine
