#include "service/rpc/request_codec.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "service/rpc/layer_groups.h"
#include "service/rpc/tensor_codec.h"

namespace keepset::service {
namespace {

using engine::OperationSpec;

// Beyond these no transformer is meant; with max_seq_len <= 2^24 every product of dimensions and
// element size stays inside int64.
constexpr uint64_t kMaxHeads = 16384;
constexpr uint64_t kMaxHeadDim = 8192;
constexpr int64_t kMaxRows = 1 << 20;
constexpr uint64_t kMaxProbeTokens = 4096;
constexpr uint64_t kMaxBytes = uint64_t{1} << 62;

absl::Status OutOfRange(absl::string_view field, uint64_t value, uint64_t min, uint64_t max) {
  return absl::InvalidArgumentError(absl::StrCat(field, "=", value, ", want ", min, "..", max));
}

absl::StatusOr<int64_t> Bounded(absl::string_view field, uint64_t value, uint64_t min,
                                uint64_t max) {
  if (value < min || value > max) return OutOfRange(field, value, min, max);
  return static_cast<int64_t>(value);
}

absl::Status DecodeModel(const v1::ModelFingerprint& wire, const CodecLimits& limits,
                         tables::ModelFingerprint& out) {
  if (wire.rope_json().size() > kMaxRopeJsonBytes) {
    return absl::InvalidArgumentError(absl::StrCat("model.rope_json: ", wire.rope_json().size(),
                                                   " bytes, want at most ", kMaxRopeJsonBytes));
  }
  if (!wire.rope_json().empty()) {
    // Only "rope" is taken from this document; the counts are there because the parser wants them.
    KEEPSET_ASSIGN_OR_RETURN(
        const tables::ModelFingerprint rope,
        tables::ParseModelFingerprint(
            absl::StrCat("{\"architecture\":\"\",\"num_layers\":1,\"num_qo_heads\":1,"
                         "\"num_kv_heads\":1,\"head_dim\":1,\"rope\":",
                         wire.rope_json(), "}"),
            "model.rope_json"));
    out.rope_theta = rope.rope_theta;
    out.rope_json = rope.rope_json;
  }
  out.architecture = wire.architecture();
  out.revision = wire.revision();
  KEEPSET_ASSIGN_OR_RETURN(out.num_layers,
                           Bounded("model.num_layers", wire.num_layers(), 1, limits.max_layers));
  KEEPSET_ASSIGN_OR_RETURN(out.num_qo_heads,
                           Bounded("model.num_qo_heads", wire.num_qo_heads(), 1, kMaxHeads));
  KEEPSET_ASSIGN_OR_RETURN(out.num_kv_heads,
                           Bounded("model.num_kv_heads", wire.num_kv_heads(), 1, kMaxHeads));
  KEEPSET_ASSIGN_OR_RETURN(out.head_dim,
                           Bounded("model.head_dim", wire.head_dim(), 1, kMaxHeadDim));
  if (out.num_qo_heads % out.num_kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("model.num_qo_heads=", out.num_qo_heads,
                     ", want a multiple of num_kv_heads=", out.num_kv_heads));
  }
  return absl::OkStatus();
}

absl::Status DecodeBudget(const v1::Budget& wire, engine::Budget& out) {
  switch (wire.kind_case()) {
    case v1::Budget::KIND_NOT_SET:
      out.kind = engine::Budget::Kind::kTableDefault;
      return absl::OkStatus();
    case v1::Budget::kTokens: {
      out.kind = engine::Budget::Kind::kTokens;
      KEEPSET_ASSIGN_OR_RETURN(out.tokens, Bounded("budget.tokens", wire.tokens(), 1,
                                                   std::numeric_limits<int32_t>::max()));
      return absl::OkStatus();
    }
    case v1::Budget::kKeptFraction:
      out.kind = engine::Budget::Kind::kKeptFraction;
      out.kept_fraction = wire.kept_fraction();
      return absl::OkStatus();
    case v1::Budget::kBytes: {
      out.kind = engine::Budget::Kind::kBytes;
      KEEPSET_ASSIGN_OR_RETURN(out.bytes, Bounded("budget.bytes", wire.bytes(), 1, kMaxBytes));
      return absl::OkStatus();
    }
  }
  return absl::InvalidArgumentError("budget: unknown kind");
}

absl::Status DecodeScope(v1::Scope wire, std::optional<engine::Scope>& out) {
  switch (wire) {
    case v1::SCOPE_UNSPECIFIED:
      return absl::OkStatus();
    case v1::SCOPE_LAYER_ELASTIC:
      out = engine::Scope::kLayerElastic;
      return absl::OkStatus();
    case v1::SCOPE_LAYER_EQUAL:
      out = engine::Scope::kLayerEqual;
      return absl::OkStatus();
    case v1::SCOPE_SEQUENCE:
      out = engine::Scope::kSequence;
      return absl::OkStatus();
    case v1::SCOPE_KV_HEAD:
      out = engine::Scope::kKvHead;
      return absl::OkStatus();
    default:
      return absl::InvalidArgumentError(absl::StrCat("scope=", static_cast<int>(wire), ", want ",
                                                     v1::SCOPE_UNSPECIFIED, "..",
                                                     v1::SCOPE_KV_HEAD));
  }
}

absl::Status CheckCount(absl::string_view field, int count, int64_t max) {
  if (count <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " has ", count, " entries, want at most ", max));
}

absl::Status DecodePolicy(const v1::OperationSpec& wire, OperationSpec& out) {
  KEEPSET_RETURN_IF_ERROR(CheckCount("parameters", wire.parameters_size(), kMaxParameters));
  out.policy = wire.policy();
  for (const auto& [name, value] : wire.parameters()) out.parameters.emplace(name, value);
  return absl::OkStatus();
}

absl::Status DecodeProtection(const v1::OperationSpec& wire, OperationSpec& out) {
  KEEPSET_ASSIGN_OR_RETURN(out.protect_sink,
                           Bounded("protect_sink", wire.protect_sink(), 0, wire.seq_len()));
  KEEPSET_ASSIGN_OR_RETURN(out.protect_window,
                           Bounded("protect_window", wire.protect_window(), 0, wire.seq_len()));
  KEEPSET_RETURN_IF_ERROR(CheckCount("protect_spans", wire.protect_spans_size(), kMaxProtectSpans));
  out.protect_spans.reserve(wire.protect_spans_size());
  for (int i = 0; i < wire.protect_spans_size(); ++i) {
    const v1::Span& span = wire.protect_spans(i);
    if (span.begin() >= span.end() || span.end() > wire.seq_len()) {
      return absl::InvalidArgumentError(absl::StrCat("protect_spans[", i, "]: [", span.begin(),
                                                     ", ", span.end(),
                                                     "), want begin < end <= ", wire.seq_len()));
    }
    out.protect_spans.push_back(
        {span.name(), static_cast<int64_t>(span.begin()), static_cast<int64_t>(span.end())});
  }
  return absl::OkStatus();
}

absl::Status MissingForGather(const v1::LayerInput& wire, absl::string_view where) {
  return absl::InvalidArgumentError(
      absl::StrCat(where, HasData(wire.k()) ? "v" : "k", " is missing, gathering needs it"));
}

absl::Status DecodeColumns(const v1::LayerInput& wire, const OperationSpec& spec,
                           absl::string_view where, RegionSource& regions,
                           engine::LayerObservation& observation) {
  switch (wire.column_reduction()) {
    case v1::COLUMN_REDUCTION_MEAN:
      observation.column_reduction = engine::ColumnReduction::kMean;
      break;
    case v1::COLUMN_REDUCTION_SUM:
      observation.column_reduction = engine::ColumnReduction::kSum;
      break;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": column_reduction=", static_cast<int>(wire.column_reduction()),
                       ", want COLUMN_REDUCTION_MEAN or COLUMN_REDUCTION_SUM"));
  }
  const int64_t heads = spec.model.num_qo_heads;
  KEEPSET_ASSIGN_OR_RETURN(
      const RowsSource rows,
      DecodeRows(wire.column_stats(), {heads, 1, spec.seq_len}, where, regions));
  observation.column_stats = {rows.bytes.data, rows.bytes.size, rows.dtype,
                              heads,           spec.seq_len,    rows.head_stride};
  return kernels::ValidateView(observation.column_stats, where);
}

}  // namespace

absl::StatusOr<OperationSpec> DecodeSpec(const v1::OperationSpec& wire, const CodecLimits& limits) {
  OperationSpec spec;
  KEEPSET_RETURN_IF_ERROR(DecodeModel(wire.model(), limits, spec.model));
  KEEPSET_RETURN_IF_ERROR(LayersLeftOut(wire).status());
  KEEPSET_ASSIGN_OR_RETURN(spec.seq_len, Bounded("seq_len", wire.seq_len(), 1, limits.max_seq_len));
  KEEPSET_ASSIGN_OR_RETURN(spec.num_rows, Bounded("num_rows", wire.num_rows(), 0,
                                                  std::min(limits.max_seq_len, kMaxRows)));
  if (wire.row_positions_size() > 0 && wire.row_positions_size() != spec.num_rows) {
    return absl::InvalidArgumentError(absl::StrCat("row_positions has ", wire.row_positions_size(),
                                                   " entries, want num_rows=", spec.num_rows));
  }
  spec.row_positions.reserve(wire.row_positions_size());
  for (int i = 0; i < wire.row_positions_size(); ++i) {
    // Positions behind the prompt are rows of a probe; the engine knows which policies take them.
    if (wire.row_positions(i) >= wire.seq_len() + kMaxProbeTokens) {
      return OutOfRange(absl::StrCat("row_positions[", i, "]"), wire.row_positions(i), 0,
                        wire.seq_len() - 1);
    }
    spec.row_positions.push_back(static_cast<int64_t>(wire.row_positions(i)));
  }
  spec.softmax_scale = wire.softmax_scale();
  KEEPSET_ASSIGN_OR_RETURN(spec.kv_dtype, DecodeDType(wire.kv_dtype(), "kv_dtype"));
  KEEPSET_ASSIGN_OR_RETURN(spec.value_head_dim,
                           Bounded("value_head_dim", wire.value_head_dim(), 0, kMaxHeadDim));

  KEEPSET_RETURN_IF_ERROR(DecodePolicy(wire, spec));
  KEEPSET_RETURN_IF_ERROR(DecodeBudget(wire.budget(), spec.budget));
  KEEPSET_RETURN_IF_ERROR(DecodeScope(wire.scope(), spec.scope));
  KEEPSET_RETURN_IF_ERROR(DecodeProtection(wire, spec));

  if (wire.has_ppl()) spec.ppl = wire.ppl();
  KEEPSET_RETURN_IF_ERROR(CheckCount("window_logprobs", wire.window_logprobs_size(), spec.seq_len));
  spec.window_logprobs.assign(wire.window_logprobs().begin(), wire.window_logprobs().end());
  switch (wire.mode()) {
    case v1::MODE_DECIDE:
      spec.mode = engine::Mode::kDecide;
      break;
    case v1::MODE_SHADOW:
      spec.mode = engine::Mode::kShadow;
      break;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("mode=", static_cast<int>(wire.mode()), ", want 0 (decide) or 1 (shadow)"));
  }
  if (!v1::GatherMode_IsValid(wire.gather())) {
    return OutOfRange("gather", static_cast<uint64_t>(wire.gather()), v1::GATHER_NONE,
                      v1::GatherMode_MAX);
  }
  if (wire.gather() == v1::GATHER_IN_PLACE && wire.shared_prefix_tokens() > 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "shared_prefix_tokens=", wire.shared_prefix_tokens(),
        ": other sequences use these blocks, want 0 with GATHER_IN_PLACE, or GATHER_DESTINATION"));
  }
  if (wire.gather() != v1::GATHER_NONE && spec.mode == engine::Mode::kShadow) {
    return absl::InvalidArgumentError("gather: a shadow operation moves nothing, want GATHER_NONE");
  }
  return spec;
}

void ApplyPin(const v1::TablePin& pin, tables::TableQuery& query) {
  query.name = pin.name();
  query.version = pin.version();
  query.digest = pin.digest();
  query.alias = pin.alias();
}

absl::StatusOr<OperationSpec> DecodeQuestion(const v1::OperationSpec& wire,
                                             const CodecLimits& limits) {
  OperationSpec spec;
  KEEPSET_RETURN_IF_ERROR(DecodeModel(wire.model(), limits, spec.model));
  KEEPSET_RETURN_IF_ERROR(LayersLeftOut(wire).status());
  KEEPSET_RETURN_IF_ERROR(DecodePolicy(wire, spec));
  return spec;
}

absl::StatusOr<tables::TableQuery> DecodeTableQuery(const v1::OperationSpec& wire,
                                                    const OperationSpec& spec,
                                                    absl::string_view table_kind) {
  tables::TableQuery query;
  ApplyPin(wire.table(), query);
  query.request_id = wire.request_id();
  query.kind = std::string(table_kind);
  query.model = spec.model;
  if (const auto it = spec.parameters.find("fingerprint_match"); it != spec.parameters.end()) {
    if (it->second == "shape") {
      query.fingerprint_match = tables::FingerprintMatch::kShape;
    } else if (it->second != "full") {
      return absl::InvalidArgumentError(
          absl::StrCat("parameter fingerprint_match=", it->second, ", want full or shape"));
    }
  }
  if (const auto it = spec.parameters.find("layer_match"); it != spec.parameters.end()) {
    if (it->second == "interpolate_depth") {
      query.layer_match = tables::LayerMatch::kInterpolateDepth;
    } else if (it->second != "exact") {
      return absl::InvalidArgumentError(
          absl::StrCat("parameter layer_match=", it->second, ", want exact or interpolate_depth"));
    }
  }
  return query;
}

absl::StatusOr<DecodedLayer> DecodeLayer(const v1::LayerInput& wire, const OperationSpec& spec,
                                         v1::GatherMode gather,
                                         absl::Span<const int32_t> block_table,
                                         RegionSource& regions) {
  if (wire.layer() >= static_cast<uint64_t>(spec.model.num_layers)) {
    return OutOfRange("layer", wire.layer(), 0, spec.model.num_layers - 1);
  }
  const std::string where = absl::StrCat("layer ", wire.layer(), ": ");
  const int64_t value_dim = spec.value_head_dim > 0 ? spec.value_head_dim : spec.model.head_dim;
  DecodedLayer layer;
  engine::LayerObservation& observation = layer.observation;
  if (wire.qo_heads_size() > spec.model.num_qo_heads) {
    return absl::InvalidArgumentError(absl::StrCat(where, "qo_heads: ", wire.qo_heads_size(),
                                                   " heads, want at most ",
                                                   spec.model.num_qo_heads));
  }
  layer.qo_heads.assign(wire.qo_heads().begin(), wire.qo_heads().end());
  observation.qo_heads = layer.qo_heads;
  const int64_t heads = layer.qo_heads.empty() ? spec.model.num_qo_heads
                                               : static_cast<int64_t>(layer.qo_heads.size());

  if (HasData(wire.q_window())) {
    KEEPSET_ASSIGN_OR_RETURN(
        const RowsSource rows,
        DecodeRows(wire.q_window(), {heads, spec.num_rows, spec.model.head_dim}, where + "q_window",
                   regions));
    observation.q_window = {
        rows.bytes.data, rows.bytes.size,     rows.dtype,       heads,
        spec.num_rows,   spec.model.head_dim, rows.head_stride, rows.row_stride};
    KEEPSET_RETURN_IF_ERROR(kernels::ValidateView(observation.q_window, where + "q_window"));
  }
  if (HasData(wire.attn_tile())) {
    KEEPSET_ASSIGN_OR_RETURN(const RowsSource rows,
                             DecodeRows(wire.attn_tile(), {heads, spec.num_rows, spec.seq_len},
                                        where + "attn_tile", regions));
    observation.attn_tile = {rows.bytes.data, rows.bytes.size, rows.dtype,       heads,
                             spec.num_rows,   spec.seq_len,    rows.head_stride, rows.row_stride};
    KEEPSET_RETURN_IF_ERROR(kernels::ValidateView(observation.attn_tile, where + "attn_tile"));
  }
  if (HasData(wire.column_stats())) {
    KEEPSET_RETURN_IF_ERROR(
        DecodeColumns(wire, spec, where + "column_stats", regions, observation));
  }
  if (HasData(wire.window_lse())) {
    KEEPSET_ASSIGN_OR_RETURN(observation.window_lse,
                             DecodeLse(wire.window_lse(), wire.lse_base(), heads, spec.num_rows,
                                       where + "window_lse", regions));
  }
  const KvShape k_shape = {spec.model.num_kv_heads, spec.seq_len, spec.model.head_dim};
  const KvShape v_shape = {spec.model.num_kv_heads, spec.seq_len, value_dim};
  if (gather == v1::GATHER_IN_PLACE) {
    if (wire.has_destination()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, "destination is given, want none with GATHER_IN_PLACE"));
    }
    if (!HasData(wire.k()) || !HasData(wire.v())) return MissingForGather(wire, where);
    KEEPSET_ASSIGN_OR_RETURN(layer.out_k,
                             DecodeInPlace(wire.k(), k_shape, block_table, where + "k", regions));
    KEEPSET_ASSIGN_OR_RETURN(layer.out_v,
                             DecodeInPlace(wire.v(), v_shape, block_table, where + "v", regions));
    observation.k = kernels::Readable(layer.out_k);
    observation.v = kernels::Readable(layer.out_v);
    return layer;
  }
  if (HasData(wire.k())) {
    KEEPSET_ASSIGN_OR_RETURN(observation.k,
                             DecodeKv(wire.k(), k_shape, block_table, where + "k", regions));
  }
  if (HasData(wire.v())) {
    KEEPSET_ASSIGN_OR_RETURN(observation.v,
                             DecodeKv(wire.v(), v_shape, block_table, where + "v", regions));
  }
  if (gather == v1::GATHER_NONE) return layer;

  if (!observation.k.present() || !observation.v.present()) {
    return MissingForGather(wire, where);
  }
  if (gather == v1::GATHER_DESTINATION) {
    const v1::LayerInput::Destination& destination = wire.destination();
    KEEPSET_ASSIGN_OR_RETURN(const int64_t capacity, Bounded(where + "destination.capacity_tokens",
                                                             destination.capacity_tokens(), 1,
                                                             std::numeric_limits<int32_t>::max()));
    KEEPSET_ASSIGN_OR_RETURN(
        layer.out_k,
        DecodeDestination(destination.k(), {k_shape.num_kv_heads, capacity, k_shape.dim},
                          observation.k.dtype, where + "destination.k", regions));
    KEEPSET_ASSIGN_OR_RETURN(
        layer.out_v,
        DecodeDestination(destination.v(), {v_shape.num_kv_heads, capacity, v_shape.dim},
                          observation.v.dtype, where + "destination.v", regions));
  }
  return layer;
}

int64_t InlineBytes(const v1::LayerInput& wire) {
  size_t bytes = 0;
  for (const v1::TensorData* data :
       {&wire.q_window().data(), &wire.window_lse().data(), &wire.attn_tile().data(),
        &wire.column_stats().data(), &wire.k().data(), &wire.v().data(),
        &wire.destination().k().data(), &wire.destination().v().data()}) {
    bytes += data->inline_().size();
  }
  return static_cast<int64_t>(bytes);
}

absl::Status VisitRegions(const v1::LayerInput& wire,
                          const std::function<absl::Status(const std::string&)>& visit) {
  for (const v1::TensorData* data :
       {&wire.q_window().data(), &wire.window_lse().data(), &wire.attn_tile().data(),
        &wire.column_stats().data(), &wire.k().data(), &wire.v().data(),
        &wire.destination().k().data(), &wire.destination().v().data()}) {
    if (data->source_case() == v1::TensorData::kRegion) {
      KEEPSET_RETURN_IF_ERROR(visit(data->region().region_id()));
    }
  }
  return absl::OkStatus();
}

}  // namespace keepset::service
