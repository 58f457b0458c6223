// Window scores, given tiles and row norms.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/fault_code.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/row_ops.h"
#include "kernels/cuda/staging.h"
#include "kernels/cuda/window_scores.h"
#include "kernels/op_checks.h"

namespace keepset::kernels::cuda {
namespace {

constexpr double kLog2E = 1.4426950408889634;
// Positions and rows are 32-bit in kernels, with room for a tile past the end; a fault's place,
// rows times positions, has 59 bits.
constexpr int64_t kMaxPositions = int64_t{1} << 29;
constexpr int64_t kMaxRows = int64_t{1} << 29;
// Row tiles and heads are counted by grid dimensions of 16 bits.
constexpr int64_t kMaxGroupRows = int64_t{1} << 20;
constexpr int64_t kMaxHeads = 65535;

absl::Status CheckLimit(int64_t value, int64_t limit, absl::string_view name,
                        absl::string_view what) {
  if (value <= limit) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what, ": ", name, "=", value, ", want at most ", limit, " on a GPU"));
}

absl::Status CheckKvLimits(const KvView& view, absl::string_view what) {
  KEEPSET_RETURN_IF_ERROR(CheckLimit(view.seq_len, kMaxPositions, "seq_len", what));
  KEEPSET_RETURN_IF_ERROR(CheckLimit(view.num_kv_heads, kMaxHeads, "num_kv_heads", what));
  return CheckLimit(view.head_dim, kMaxPositions, "head_dim", what);
}

absl::StatusOr<const int32_t*> UploadLimits(StreamState& state,
                                            absl::Span<const int64_t> row_positions) {
  const std::vector<int32_t> limits(row_positions.begin(), row_positions.end());
  KEEPSET_ASSIGN_OR_RETURN(
      const std::byte* const device,
      state.Upload(limits.data(), static_cast<int64_t>(limits.size() * sizeof(int32_t))));
  return reinterpret_cast<const int32_t*>(device);
}

absl::Status DescribeWindowFault(uint64_t code, const std::string& what, int64_t num_rows,
                                 int64_t seq_len) {
  const int64_t place = PlaceOfFault(code);
  const auto row_name = [&](int64_t row) {
    return absl::StrCat("head ", row / num_rows, " row ", row % num_rows);
  };
  switch (KindOfFault(code)) {
    case FaultKind::kQuery:
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": q: ", row_name(place), " is not finite"));
    case FaultKind::kLse:
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": window_lse: ", row_name(place), " is not finite"));
    case FaultKind::kKey:
      return absl::InvalidArgumentError(absl::StrCat(
          what, ": k: head ", place / seq_len, " position ", place % seq_len, " is not finite"));
    case FaultKind::kLogit:
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": logits: ", row_name(place / seq_len), " position ", place % seq_len,
                       " is not finite: q.k * softmax_scale overflows"));
    case FaultKind::kLseTooLow:
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": window_lse: ", row_name(place),
                       " lies far below the row's logits, want the natural log-sum-exp"));
    case FaultKind::kRowSum:
      return absl::InvalidArgumentError(absl::StrCat(
          what, ": logits: ", row_name(place), " is not finite: q.k * softmax_scale overflows"));
    default:
      return absl::InternalError(absl::StrCat(what, ": fault code ", code));
  }
}

absl::Status DescribeNormFault(uint64_t code, const std::string& what, int64_t seq_len) {
  const int64_t place = PlaceOfFault(code);
  return absl::InvalidArgumentError(absl::StrCat(
      what, ": head ", place / seq_len, " position ", place % seq_len,
      KindOfFault(code) == FaultKind::kNormInput ? " is not finite" : " has a norm beyond fp32"));
}

absl::Status DescribeTileFault(uint64_t code, const std::string& what, int64_t num_rows,
                               int64_t seq_len) {
  const int64_t place = PlaceOfFault(code);
  if (KindOfFault(code) == FaultKind::kTileSum) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": attn_tile: head ", place, " columns sum beyond fp32"));
  }
  const int64_t row = place / seq_len;
  return absl::InvalidArgumentError(
      absl::StrCat(what, ": attn_tile: head ", row / num_rows, " row ", row % num_rows,
                   " position ", place % seq_len, " is not a number that is finite and >= 0"));
}

absl::Status RefuseHeads(absl::Span<const HeadRows> heads, absl::string_view what) {
  if (heads.empty()) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat(
      what, ": the CUDA backend reads all heads of a layer, no list of heads; want cpu"));
}

// Where in the call's tensors the used rows lie, and how they are reduced.
absl::Status StageQueries(StreamState& state, const WindowArgs& args, WindowParams* params) {
  const int64_t first_row = args.reduction == RowReduction::kLast ? args.q.num_rows - 1 : 0;
  const int64_t num_rows = args.q.num_rows - first_row;
  HostMatrix q;
  q.dtype = args.q.dtype;
  q.data = args.q.data + first_row * args.q.row_stride * DTypeBytes(args.q.dtype);
  q.heads = args.q.num_qo_heads;
  q.rows = num_rows;
  q.columns = args.q.head_dim;
  q.head_stride = args.q.head_stride;
  q.row_stride = args.q.row_stride;
  KEEPSET_ASSIGN_OR_RETURN(const StagedMatrix queries,
                           StageMatrix(state, q, absl::StrCat(args.what, ": q")));
  params->q = queries.data;
  params->q_head_bytes = queries.head_bytes;
  params->q_row_bytes = queries.row_bytes;
  params->q_dtype = q.dtype;
  params->num_rows = static_cast<int32_t>(num_rows);
  params->row_divider = FastDivider(static_cast<uint32_t>(num_rows));
  params->row_base = static_cast<int32_t>(first_row);
  params->all_rows = static_cast<int32_t>(args.q.num_rows);
  params->divisor =
      args.reduction == RowReduction::kMean ? static_cast<float>(args.q.num_rows) : 1.0f;
  KEEPSET_ASSIGN_OR_RETURN(params->row_limits,
                           UploadLimits(state, args.row_positions.subspan(first_row)));
  if (!args.window_lse.present()) return absl::OkStatus();
  HostMatrix lse;
  lse.dtype = args.window_lse.dtype;
  lse.data = args.window_lse.data + first_row * DTypeBytes(lse.dtype);
  lse.heads = args.window_lse.num_qo_heads;
  lse.rows = 1;
  lse.columns = num_rows;
  lse.head_stride = args.window_lse.head_stride;
  KEEPSET_ASSIGN_OR_RETURN(const StagedMatrix given,
                           StageMatrix(state, lse, absl::StrCat(args.what, ": window_lse")));
  params->lse = given.data;
  params->lse_head_bytes = given.head_bytes;
  params->lse_dtype = lse.dtype;
  return absl::OkStatus();
}

absl::Status StageValues(StreamState& state, const WindowArgs& args, WindowParams* params) {
  if (args.value_norms == nullptr) return absl::OkStatus();
  const std::string what = absl::StrCat(args.what, ": v");
  KEEPSET_RETURN_IF_ERROR(CheckKvLimits(args.v, what));
  KEEPSET_ASSIGN_OR_RETURN(params->v, StageRows(state, args.v, what));
  params->value_norms = Cuda(*args.value_norms).Overwrite(state);
  KEEPSET_ASSIGN_OR_RETURN(params->value_fault,
                           state.NewFault([what, seq_len = args.v.seq_len](uint64_t code) {
                             return DescribeNormFault(code, what, seq_len);
                           }));
  return absl::OkStatus();
}

}  // namespace

absl::Status WindowColumns(StreamState& state, const WindowArgs& args, ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(CheckWindow(args, out));
  KEEPSET_RETURN_IF_ERROR(RefuseHeads(args.heads, args.what));
  KEEPSET_RETURN_IF_ERROR(CheckKvLimits(args.k, absl::StrCat(args.what, ": k")));
  const int64_t group = args.q.num_qo_heads / args.k.num_kv_heads;
  KEEPSET_RETURN_IF_ERROR(CheckLimit(args.q.num_rows, kMaxGroupRows / group, "num_rows",
                                     absl::StrCat(args.what, ": q")));
  KEEPSET_RETURN_IF_ERROR(CheckLimit(args.q.num_qo_heads, kMaxRows / args.q.num_rows,
                                     "num_qo_heads", absl::StrCat(args.what, ": q")));
  WindowParams params;
  params.group = static_cast<int32_t>(group);
  params.scale2 = static_cast<float>(args.softmax_scale * kLog2E);
  params.padded_dim = static_cast<int32_t>((args.k.head_dim + 15) / 16 * 16);
  params.num_chunks = static_cast<int32_t>((args.k.seq_len + kChunkTokens - 1) / kChunkTokens);
  KEEPSET_RETURN_IF_ERROR(StageQueries(state, args, &params));
  KEEPSET_ASSIGN_OR_RETURN(params.k, StageRows(state, args.k, absl::StrCat(args.what, ": k")));
  const std::string what(args.what);
  KEEPSET_ASSIGN_OR_RETURN(params.fault, state.NewFault([what, num_rows = args.q.num_rows,
                                                         seq_len = args.k.seq_len](uint64_t code) {
    return DescribeWindowFault(code, what, num_rows, seq_len);
  }));
  KEEPSET_RETURN_IF_ERROR(StageValues(state, args, &params));
  params.out = Cuda(out).Overwrite(state);

  const WindowPlan plan =
      PlanWindow(params, state.traits().max_shared_bytes, state.traits().l2_bytes);
  const int64_t reference_bytes = ReferenceBytes(params);
  const int64_t partial_bytes = params.lse == nullptr ? PartialBytes(params, plan) : 0;
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const workspace,
                           state.Workspace(reference_bytes + partial_bytes));
  params.references = reinterpret_cast<float*>(workspace);
  params.partial = reinterpret_cast<RowStat*>(workspace + reference_bytes);
  const ColumnReduction reduction =
      args.reduction == RowReduction::kMax ? ColumnReduction::kMax : ColumnReduction::kSum;
  return state.health().Check(LaunchWindowScores(params, plan, reduction, state.stream()),
                              "window scores");
}

absl::Status TileColumns(StreamState& state, const TileArgs& args, ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(CheckTile(args, out));
  KEEPSET_RETURN_IF_ERROR(RefuseHeads(args.heads, args.what));
  const TileView& tile = args.tile;
  const std::string what(args.what);
  KEEPSET_RETURN_IF_ERROR(CheckLimit(tile.seq_len, kMaxPositions, "seq_len", what));
  KEEPSET_RETURN_IF_ERROR(CheckLimit(tile.num_qo_heads, kMaxHeads, "num_qo_heads", what));
  KEEPSET_RETURN_IF_ERROR(
      CheckLimit(tile.num_rows, kMaxRows / tile.num_qo_heads, "num_rows", what));
  HostMatrix matrix;
  matrix.data = tile.data;
  matrix.dtype = tile.dtype;
  matrix.heads = tile.num_qo_heads;
  matrix.rows = tile.num_rows;
  matrix.columns = tile.seq_len;
  matrix.head_stride = tile.head_stride;
  matrix.row_stride = tile.row_stride;
  KEEPSET_ASSIGN_OR_RETURN(const StagedMatrix staged,
                           StageMatrix(state, matrix, absl::StrCat(what, ": attn_tile")));
  TileColumnsParams params;
  params.tile = staged.data;
  params.head_bytes = staged.head_bytes;
  params.row_bytes = staged.row_bytes;
  params.dtype = tile.dtype;
  params.num_heads = static_cast<int32_t>(tile.num_qo_heads);
  params.num_rows = static_cast<int32_t>(tile.num_rows);
  params.first_row =
      args.reduction == RowReduction::kLast ? static_cast<int32_t>(tile.num_rows - 1) : 0;
  params.seq_len = static_cast<int32_t>(tile.seq_len);
  KEEPSET_ASSIGN_OR_RETURN(params.row_limits, UploadLimits(state, args.row_positions));
  params.reduction = args.reduction;
  params.out = Cuda(out).Overwrite(state);
  KEEPSET_ASSIGN_OR_RETURN(params.fault, state.NewFault([what, num_rows = tile.num_rows,
                                                         seq_len = tile.seq_len](uint64_t code) {
    return DescribeTileFault(code, what, num_rows, seq_len);
  }));
  return state.health().Check(LaunchTileColumns(params, state.stream()), "tile columns");
}

absl::Status RowNorms(StreamState& state, const KvView& x, absl::string_view what,
                      ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(CheckRowNorms(x, what, out));
  KEEPSET_RETURN_IF_ERROR(CheckKvLimits(x, what));
  RowNormsParams params;
  KEEPSET_ASSIGN_OR_RETURN(params.rows, StageRows(state, x, what));
  params.out = Cuda(out).Overwrite(state);
  KEEPSET_ASSIGN_OR_RETURN(
      params.fault, state.NewFault([what = std::string(what), seq_len = x.seq_len](uint64_t code) {
        return DescribeNormFault(code, what, seq_len);
      }));
  return state.health().Check(LaunchRowNorms(params, state.stream()), "row norms");
}

}  // namespace keepset::kernels::cuda
