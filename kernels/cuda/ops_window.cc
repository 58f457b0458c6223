// Window scores: what a call wants as rows, units and outputs of the kernels, and the tensors of
// its layers.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/cublas_window.h"
#include "kernels/cuda/fault_code.h"
#include "kernels/cuda/hopper_window.h"
#include "kernels/cuda/op_limits.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/staging.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/window_scores.h"
#include "kernels/op_checks.h"

namespace keepset::kernels::cuda {
namespace {

constexpr double kLog2E = 1.4426950408889634;

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

absl::Status CheckLayer(const WindowArgs& args, const ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(CheckWindow(args, out));
  KEEPSET_RETURN_IF_ERROR(CheckKvLimits(args.k, absl::StrCat(args.what, ": k")));
  const std::string q = absl::StrCat(args.what, ": q");
  const int64_t group = MostHeadsOfAKvHead(args);
  KEEPSET_RETURN_IF_ERROR(CheckLimit(args.q.num_rows, kMaxGroupRows / group, "num_rows", q));
  KEEPSET_RETURN_IF_ERROR(
      CheckLimit(args.q.num_qo_heads, kMaxRows / args.q.num_rows, "num_qo_heads", q));
  if (args.value_norms == nullptr) return absl::OkStatus();
  return CheckKvLimits(args.v, absl::StrCat(args.what, ": v"));
}

// What kernels make of a layer.
struct WindowList {
  std::vector<WindowRow> rows;
  std::vector<WindowUnit> units;
  std::vector<WindowOutput> outputs;
};

// Adds what is wanted of one query head: the rows of the range that covers it, and its outputs.
void AddHead(const WindowArgs& args, absl::Span<const HeadRows> wanted, int64_t first_out_row,
             WindowList* list) {
  int64_t begin = args.q.num_rows;
  int64_t end = 0;
  for (const HeadRows& one : wanted) {
    begin = std::min(begin, one.first_row);
    end = std::max(end, one.first_row + one.num_rows);
  }
  const auto head = static_cast<int32_t>(wanted.front().head);
  const auto kv_head = static_cast<int32_t>(KvHeadOf(args, wanted.front()));
  // Rows behind the prompt see all of it, and not the zeros that fill its last tile.
  const auto limit_of = [&](int64_t row) {
    return static_cast<int32_t>(std::min(args.row_positions[row], args.k.seq_len - 1));
  };
  const int32_t smallest_limit = limit_of(begin);
  const auto first_row = static_cast<int32_t>(list->rows.size());
  if (list->units.empty() || list->units.back().kv_head != kv_head) {
    WindowUnit unit;
    unit.kv_head = kv_head;
    unit.first_row = first_row;
    unit.first_output = static_cast<int32_t>(list->outputs.size());
    unit.smallest_limit = smallest_limit;
    list->units.push_back(unit);
  }
  for (int64_t i = begin; i < end; ++i) {
    list->rows.push_back({head, static_cast<int32_t>(i), limit_of(i)});
  }
  for (size_t j = 0; j < wanted.size(); ++j) {
    WindowOutput output;
    output.out_row = static_cast<int32_t>(first_out_row + static_cast<int64_t>(j));
    output.first_row = first_row + static_cast<int32_t>(wanted[j].first_row - begin);
    output.num_rows = static_cast<int32_t>(wanted[j].num_rows);
    const RowReduction reduction = wanted[j].reduction;
    if (reduction == RowReduction::kMax) output.reduction = ColumnReduction::kMax;
    if (reduction == RowReduction::kMean) output.divisor = static_cast<float>(wanted[j].num_rows);
    list->outputs.push_back(output);
  }
  WindowUnit& unit = list->units.back();
  unit.num_rows += static_cast<int32_t>(end - begin);
  unit.num_outputs += static_cast<int32_t>(wanted.size());
  unit.smallest_limit = std::min(unit.smallest_limit, smallest_limit);
}

WindowList ListWanted(const WindowArgs& args) {
  const std::vector<HeadRows> wanted =
      WantedRows(args.heads, args.reduction, args.q.num_qo_heads, args.q.num_rows);
  WindowList list;
  for (size_t begin = 0; begin < wanted.size();) {
    size_t end = begin;
    while (end < wanted.size() && wanted[end].head == wanted[begin].head) ++end;
    AddHead(args, absl::MakeConstSpan(wanted).subspan(begin, end - begin),
            static_cast<int64_t>(begin), &list);
    begin = end;
  }
  return list;
}

// Whether one list serves both, given that their shapes are the same.
bool WantTheSame(const WindowArgs& a, const WindowArgs& b) {
  return a.q.num_qo_heads == b.q.num_qo_heads && a.reduction == b.reduction && a.heads == b.heads &&
         a.row_positions == b.row_positions;
}

struct StagedLayer {
  WindowShape shape;
  WindowLayer layer;
  KeyMemory keys;
};

// Splits staged rows into what layers share and what is the layer's own.
void SplitRows(const DeviceRows& rows, DeviceRows* shape, const std::byte** data,
               const int32_t** table) {
  *shape = rows;
  *data = rows.data;
  *table = rows.block_table;
  shape->data = nullptr;
  shape->block_table = nullptr;
}

absl::Status StageQueries(StreamState& state, const WindowArgs& args, StagedLayer* staged) {
  HostMatrix q;
  q.dtype = args.q.dtype;
  q.data = args.q.data;
  q.heads = args.q.num_qo_heads;
  q.rows = args.q.num_rows;
  q.columns = args.q.head_dim;
  q.head_stride = args.q.head_stride;
  q.row_stride = args.q.row_stride;
  KEEPSET_ASSIGN_OR_RETURN(const StagedMatrix queries,
                           StageMatrix(state, q, absl::StrCat(args.what, ": q")));
  staged->layer.q = queries.data;
  staged->shape.q_head_bytes = queries.head_bytes;
  staged->shape.q_row_bytes = queries.row_bytes;
  staged->shape.q_dtype = q.dtype;
  staged->shape.all_rows = static_cast<int32_t>(args.q.num_rows);
  if (!args.window_lse.present()) return absl::OkStatus();
  HostMatrix lse;
  lse.dtype = args.window_lse.dtype;
  lse.data = args.window_lse.data;
  lse.heads = args.window_lse.num_qo_heads;
  lse.rows = 1;
  lse.columns = args.window_lse.num_rows;
  lse.head_stride = args.window_lse.head_stride;
  KEEPSET_ASSIGN_OR_RETURN(const StagedMatrix given,
                           StageMatrix(state, lse, absl::StrCat(args.what, ": window_lse")));
  staged->layer.lse = given.data;
  staged->shape.has_lse = true;
  staged->shape.lse_head_bytes = given.head_bytes;
  staged->shape.lse_dtype = lse.dtype;
  staged->shape.lse_base = args.window_lse.base;
  return absl::OkStatus();
}

// Faults of the layer have been reserved.
absl::StatusOr<StagedLayer> StageLayer(StreamState& state, const WindowArgs& args,
                                       ScoreBuffer& out) {
  StagedLayer staged;
  WindowLayer& layer = staged.layer;
  staged.shape.scale2 = static_cast<float>(args.softmax_scale * kLog2E);
  staged.shape.padded_dim = static_cast<int32_t>((args.k.head_dim + 15) / 16 * 16);
  staged.shape.num_chunks =
      static_cast<int32_t>((args.k.seq_len + kChunkTokens - 1) / kChunkTokens);
  KEEPSET_RETURN_IF_ERROR(StageQueries(state, args, &staged));
  KEEPSET_ASSIGN_OR_RETURN(const DeviceRows k,
                           StageRows(state, args.k, absl::StrCat(args.what, ": k")));
  SplitRows(k, &staged.shape.k, &layer.k, &layer.k_table);
  staged.keys.size_bytes = args.k.size_bytes;
  if (layer.k_table != nullptr) {
    staged.keys.last_block = args.k.block_table[(args.k.seq_len - 1) / args.k.block_size];
  }
  layer.fault = state.NewFault([what = std::string(args.what), num_rows = args.q.num_rows,
                                seq_len = args.k.seq_len](uint64_t code) {
    return DescribeWindowFault(code, what, num_rows, seq_len);
  });
  // With a list of heads not every KV head is met: the norms are an op of their own then.
  if (args.value_norms != nullptr && args.heads.empty()) {
    const std::string what = absl::StrCat(args.what, ": v");
    KEEPSET_ASSIGN_OR_RETURN(const DeviceRows v, StageRows(state, args.v, what));
    SplitRows(v, &staged.shape.v, &layer.v, &layer.v_table);
    layer.value_norms = Cuda(*args.value_norms).Overwrite(state);
    layer.value_fault = state.NewFault([what, seq_len = args.v.seq_len](uint64_t code) {
      return DescribeNormFault(code, what, seq_len);
    });
  }
  layer.out = Cuda(out).Overwrite(state);
  return staged;
}

// Hopper's kernels for the layers of params; plan.unsuited is empty.
absl::Status QueueHopper(StreamState& state, const WindowParams& params, const HopperPlan& plan,
                         absl::Span<const KeyMemory> keys) {
  HopperParams hopper;
  hopper.window = params;
  KEEPSET_ASSIGN_OR_RETURN(hopper.parts, UploadArray<HopperPart>(state, plan.parts));
  if (!state.is_queued()) return absl::OkStatus();
  for (int layer = 0; layer < params.num_layers; ++layer) {
    KEEPSET_RETURN_IF_ERROR(EncodeTensorMap(state.traits().tensor_maps,
                                            KeyMap(params, plan, layer, keys[layer]),
                                            &hopper.key_maps[layer]));
  }
  state.NoteWindowKernels(WindowKernels::kHopper);
  return state.Queue("window scores", [&] {
    return LaunchHopperWindowScores(hopper, plan, state.traits().multiprocessors, state.stream());
  });
}

// The layers of params with products by cuBLAS.
absl::Status QueueCublas(StreamState& state, const WindowParams& params,
                         absl::Span<const WindowUnit> units, absl::string_view what) {
  KEEPSET_ASSIGN_OR_RETURN(const CublasPlan plan, PlanCublas(params, what));
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const workspace,
                           state.Workspace(CublasWorkspaceBytes(params, plan)));
  state.NoteWindowKernels(WindowKernels::kCublas);
  if (!state.is_queued()) return absl::OkStatus();
  return QueueCublasWindowScores(params, plan, units, workspace, *state.traits().products,
                                 state.health(), state.stream());
}

// Queues the layers of params, which share one list. keys: of each layer.
absl::Status QueueLayers(StreamState& state, const WindowArgs& first,
                         absl::Span<const KeyMemory> keys, WindowParams* params) {
  const WindowList list = ListWanted(first);
  KEEPSET_ASSIGN_OR_RETURN(params->rows, UploadArray<WindowRow>(state, list.rows));
  KEEPSET_ASSIGN_OR_RETURN(params->units, UploadArray<WindowUnit>(state, list.units));
  KEEPSET_ASSIGN_OR_RETURN(params->outputs, UploadArray<WindowOutput>(state, list.outputs));
  params->num_rows = static_cast<int32_t>(list.rows.size());
  params->num_units = static_cast<int32_t>(list.units.size());
  for (const WindowUnit& unit : list.units) {
    params->max_unit_rows = std::max(params->max_unit_rows, unit.num_rows);
  }
  const DeviceTraits& traits = state.traits();
  if (traits.products != nullptr) return QueueCublas(state, *params, list.units, first.what);
  WindowPlan plan = PlanWindow(*params, traits.max_shared_bytes, traits.l2_bytes);
  std::optional<HopperPlan> hopper;
  if (traits.tensor_maps != nullptr) {
    hopper = PlanHopper(*params, plan, list.units, list.outputs, keys,
                        {traits.max_shared_bytes, traits.multiprocessors});
    if (!hopper->unsuited.empty()) hopper.reset();
  }
  if (hopper.has_value()) {
    plan.units_at_once = hopper->units_at_once;
    params->chunk_parts = kStatsParts;
  }
  const int64_t reference_bytes = ReferenceBytes(*params);
  const int64_t partial_bytes = params->shape.has_lse ? 0 : PartialBytes(*params, plan);
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const workspace,
                           state.Workspace(reference_bytes + partial_bytes));
  params->references = reinterpret_cast<float*>(workspace);
  params->partial = reinterpret_cast<RowStat*>(workspace + reference_bytes);
  if (hopper.has_value()) return QueueHopper(state, *params, *hopper, keys);
  state.NoteWindowKernels(WindowKernels::kPortable);
  return state.Queue("window scores",
                     [&] { return LaunchWindowScores(*params, plan, state.stream()); });
}

// At most kMaxWindowLayers layers; neighbours of one shape that want the same are queued together.
absl::Status QueueSomeLayers(StreamState& state, absl::Span<const WindowArgs> layers,
                             absl::Span<ScoreBuffer* const> outs) {
  for (const WindowArgs& args : layers) {
    if (args.value_norms == nullptr || args.heads.empty()) continue;
    KEEPSET_RETURN_IF_ERROR(
        RowNorms(state, args.v, absl::StrCat(args.what, ": v"), *args.value_norms));
  }
  const auto num_layers = static_cast<int64_t>(layers.size());
  KEEPSET_RETURN_IF_ERROR(state.ReserveFaults(2 * num_layers));
  WindowParams params;
  std::vector<KeyMemory> keys;
  size_t first = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (i > first && state.has_many_temporaries()) {
      KEEPSET_RETURN_IF_ERROR(QueueLayers(state, layers[first], keys, &params));
      KEEPSET_RETURN_IF_ERROR(state.ReserveFaults(2 * num_layers));
      params = WindowParams();
      keys.clear();
      first = i;
    }
    KEEPSET_ASSIGN_OR_RETURN(const StagedLayer staged, StageLayer(state, layers[i], *outs[i]));
    if (i > first && !(staged.shape == params.shape && WantTheSame(layers[i], layers[first]))) {
      KEEPSET_RETURN_IF_ERROR(QueueLayers(state, layers[first], keys, &params));
      params = WindowParams();
      keys.clear();
      first = i;
    }
    params.shape = staged.shape;
    params.layers[params.num_layers++] = staged.layer;
    keys.push_back(staged.keys);
  }
  return QueueLayers(state, layers[first], keys, &params);
}

}  // namespace

absl::Status WindowColumnsOfLayers(StreamState& state, absl::Span<const WindowArgs> layers,
                                   absl::Span<ScoreBuffer* const> outs) {
  KEEPSET_RETURN_IF_ERROR(CheckLayerCount(layers, outs));
  for (size_t i = 0; i < layers.size(); ++i) {
    KEEPSET_RETURN_IF_ERROR(CheckLayer(layers[i], *outs[i]));
  }
  for (size_t begin = 0; begin < layers.size(); begin += kMaxWindowLayers) {
    KEEPSET_RETURN_IF_ERROR(QueueSomeLayers(state, layers.subspan(begin, kMaxWindowLayers),
                                            outs.subspan(begin, kMaxWindowLayers)));
  }
  return absl::OkStatus();
}

absl::Status WindowColumns(StreamState& state, const WindowArgs& args, ScoreBuffer& out) {
  ScoreBuffer* const outs[] = {&out};
  return WindowColumnsOfLayers(state, absl::MakeConstSpan(&args, 1), outs);
}

}  // namespace keepset::kernels::cuda
