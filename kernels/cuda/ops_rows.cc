// Given tiles, row norms and novelty of keys.
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/fault_code.h"
#include "kernels/cuda/key_novelty.h"
#include "kernels/cuda/op_limits.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/row_ops.h"
#include "kernels/cuda/staging.h"
#include "kernels/novelty_order.h"
#include "kernels/op_checks.h"

namespace keepset::kernels::cuda {
namespace {

absl::Status DescribeTileFault(uint64_t code, const std::string& name, int64_t num_rows,
                               int64_t seq_len) {
  const int64_t place = PlaceOfFault(code);
  if (KindOfFault(code) == FaultKind::kTileSum) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": head ", place, " columns sum beyond fp32"));
  }
  const int64_t row = place / seq_len;
  return absl::InvalidArgumentError(
      absl::StrCat(TileRowName(name, num_rows, row / num_rows, row % num_rows), " position ",
                   place % seq_len, " is not a number that is finite and >= 0"));
}

}  // namespace

absl::Status DescribeNormFault(uint64_t code, const std::string& what, int64_t seq_len) {
  const int64_t place = PlaceOfFault(code);
  return absl::InvalidArgumentError(absl::StrCat(
      what, ": head ", place / seq_len, " position ", place % seq_len,
      KindOfFault(code) == FaultKind::kNormInput ? " is not finite" : " has a norm beyond fp32"));
}

absl::Status TileColumns(StreamState& state, const TileArgs& args, ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(CheckTile(args, out));
  KEEPSET_RETURN_IF_ERROR(state.ReserveFaults(1));
  const TileView& tile = args.tile;
  const std::string what(args.what);
  const std::string name = absl::StrCat(what, ": ", args.tensor);
  KEEPSET_RETURN_IF_ERROR(CheckLimit(tile.seq_len, kMaxPositions, "seq_len", what));
  KEEPSET_RETURN_IF_ERROR(
      CheckLimit(tile.num_rows, kMaxRows / tile.num_qo_heads, "num_rows", what));
  const std::vector<HeadRows> wanted =
      WantedRows(args.heads, args.reduction, tile.num_qo_heads, tile.num_rows);
  KEEPSET_RETURN_IF_ERROR(
      CheckLimit(static_cast<int64_t>(wanted.size()), kMaxHeads, "heads", what));
  std::vector<TileOutput> outputs;
  for (const HeadRows& one : wanted) {
    TileOutput output;
    output.head = static_cast<int32_t>(one.head);
    output.first_row = static_cast<int32_t>(one.first_row);
    output.num_rows = static_cast<int32_t>(one.num_rows);
    output.reduction = one.reduction;
    output.divisor = static_cast<float>(MeanRows(args, one));
    outputs.push_back(output);
  }
  HostMatrix matrix;
  matrix.data = tile.data;
  matrix.dtype = tile.dtype;
  matrix.heads = tile.num_qo_heads;
  matrix.rows = tile.num_rows;
  matrix.columns = tile.seq_len;
  matrix.head_stride = tile.head_stride;
  matrix.row_stride = tile.row_stride;
  KEEPSET_ASSIGN_OR_RETURN(const StagedMatrix staged, StageMatrix(state, matrix, name));
  TileColumnsParams params;
  params.tile = staged.data;
  params.head_bytes = staged.head_bytes;
  params.row_bytes = staged.row_bytes;
  params.dtype = tile.dtype;
  params.num_outputs = static_cast<int32_t>(outputs.size());
  params.all_rows = static_cast<int32_t>(tile.num_rows);
  params.seq_len = static_cast<int32_t>(tile.seq_len);
  KEEPSET_ASSIGN_OR_RETURN(params.outputs, UploadArray<TileOutput>(state, outputs));
  const std::vector<int32_t> limits(args.row_positions.begin(), args.row_positions.end());
  KEEPSET_ASSIGN_OR_RETURN(params.row_limits, UploadArray<int32_t>(state, limits));
  params.out = Cuda(out).Overwrite(state);
  params.fault =
      state.NewFault([name, num_rows = tile.num_rows, seq_len = tile.seq_len](uint64_t code) {
        return DescribeTileFault(code, name, num_rows, seq_len);
      });
  return state.Queue("tile columns", [&] { return LaunchTileColumns(params, state.stream()); });
}

absl::Status RowNorms(StreamState& state, const KvView& x, absl::string_view what,
                      ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(CheckRowNorms(x, what, out));
  KEEPSET_RETURN_IF_ERROR(CheckKvLimits(x, what));
  KEEPSET_RETURN_IF_ERROR(state.ReserveFaults(1));
  RowNormsParams params;
  KEEPSET_ASSIGN_OR_RETURN(params.rows, StageRows(state, x, what));
  params.out = Cuda(out).Overwrite(state);
  params.fault = state.NewFault([what = std::string(what), seq_len = x.seq_len](uint64_t code) {
    return DescribeNormFault(code, what, seq_len);
  });
  return state.Queue("row norms", [&] { return LaunchRowNorms(params, state.stream()); });
}

absl::Status KeyNovelty(StreamState& state, const KvView& k, absl::Span<const int64_t> kv_heads,
                        absl::string_view what, ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(CheckKeyNovelty(k, kv_heads, what, out));
  KEEPSET_RETURN_IF_ERROR(CheckKvLimits(k, what));
  KEEPSET_RETURN_IF_ERROR(
      CheckLimit(static_cast<int64_t>(kv_heads.size()), kMaxHeads, "kv_heads", what));
  KEEPSET_RETURN_IF_ERROR(state.ReserveFaults(1));
  const std::vector<int32_t> heads(kv_heads.begin(), kv_heads.end());
  NoveltyParams params;
  KEEPSET_ASSIGN_OR_RETURN(params.k, StageRows(state, k, what));
  KEEPSET_ASSIGN_OR_RETURN(params.kv_heads, UploadArray<int32_t>(state, heads));
  params.num_heads = static_cast<int32_t>(heads.size());
  params.num_chunks = static_cast<int32_t>((k.seq_len + kNoveltyChunk - 1) / kNoveltyChunk);
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const workspace,
                           state.Workspace(NoveltyWorkspaceBytes(params)));
  PlaceNoveltyWorkspace(workspace, &params);
  params.out = Cuda(out).Overwrite(state);
  params.fault =
      state.NewFault([what = std::string(what), heads, seq_len = k.seq_len](uint64_t code) {
        const int64_t place = PlaceOfFault(code);
        return absl::InvalidArgumentError(
            absl::StrCat(what, ": head ", heads[static_cast<size_t>(place / seq_len)], " position ",
                         place % seq_len, " is not finite"));
      });
  return state.Queue("key novelty", [&] { return LaunchKeyNovelty(params, state.stream()); });
}

}  // namespace keepset::kernels::cuda
