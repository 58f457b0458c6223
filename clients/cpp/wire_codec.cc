#include "clients/cpp/wire_codec.h"

#include <bit>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace keepset::client {
namespace {

static_assert(std::endian::native == std::endian::little, "tensor bytes travel little-endian");

absl::Status EncodeData(int64_t layer, absl::string_view field, const void* data,
                        int64_t size_bytes, const RegionResolver& resolve, KvPlacement placement,
                        v1::TensorData* out) {
  if (size_bytes < 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        "layer ", layer, ": ", field, " size_bytes=", size_bytes, ", want at least 1"));
  }
  v1::RegionSlice slice;
  if (resolve(data, size_bytes, &slice)) {
    *out->mutable_region() = std::move(slice);
    return absl::OkStatus();
  }
  if (placement == KvPlacement::kRegionsOnly) {
    return absl::FailedPreconditionError(
        absl::StrCat("layer ", layer, ": ", field,
                     " lies in no registered region; allocate it from one or connect with inline "
                     "transport"));
  }
  out->set_inline_(data, size_bytes);
  return absl::OkStatus();
}

absl::Status EncodeRows(int64_t layer, absl::string_view field, const RowsTensor& rows,
                        const RegionResolver& resolve, v1::RowsTensor* out) {
  out->set_dtype(static_cast<v1::DType>(rows.dtype));
  out->set_head_stride(rows.head_stride);
  out->set_row_stride(rows.row_stride);
  return EncodeData(layer, field, rows.data, rows.size_bytes, resolve, KvPlacement::kAnywhere,
                    out->mutable_data());
}

absl::Status EncodeKv(int64_t layer, absl::string_view field, const KvTensor& kv,
                      const RegionResolver& resolve, KvPlacement placement, v1::KvTensor* out) {
  out->set_dtype(static_cast<v1::DType>(kv.dtype));
  out->set_head_stride(kv.head_stride);
  out->set_token_stride(kv.token_stride);
  out->set_block_size(kv.block_size);
  out->set_block_stride(kv.block_stride);
  out->mutable_block_table()->Add(kv.block_table.begin(), kv.block_table.end());
  return EncodeData(layer, field, kv.data, kv.size_bytes, resolve, placement, out->mutable_data());
}

absl::Status BadReply(int64_t layer, absl::string_view what) {
  return absl::InternalError(absl::StrCat("reply, layer ", layer, ": ", what));
}

absl::StatusOr<KeepSet> DecodeSet(const v1::KeepSet& set, int64_t layer, int64_t seq_len) {
  KeepSet out;
  out.candidates = set.candidates();
  out.filled = set.filled();
  if (set.all()) {
    if (static_cast<int64_t>(set.kept()) != seq_len) {
      return BadReply(
          layer, absl::StrCat("all positions kept, but kept=", set.kept(), ", want ", seq_len));
    }
    out.keep_indices.resize(seq_len);
    std::iota(out.keep_indices.begin(), out.keep_indices.end(), 0);
    return out;
  }
  const std::string& bytes = set.indices();
  if (bytes.size() % sizeof(int32_t) != 0 || bytes.size() / sizeof(int32_t) != set.kept()) {
    return BadReply(layer, absl::StrCat("kept=", set.kept(), ", but ", bytes.size(),
                                        " bytes of indices, want ", 4 * set.kept()));
  }
  out.keep_indices.resize(set.kept());
  if (!bytes.empty()) std::memcpy(out.keep_indices.data(), bytes.data(), bytes.size());
  int64_t previous = -1;
  for (int32_t index : out.keep_indices) {
    if (index <= previous || index >= seq_len) {
      return BadReply(layer, absl::StrCat("index ", index, " after ", previous,
                                          ", want ascending positions below ", seq_len));
    }
    previous = index;
  }
  return out;
}

int64_t SetTokens(const LayerResult& layer, int64_t head) {
  const size_t set = layer.sets.size() == 1 ? 0 : head;
  return static_cast<int64_t>(layer.sets[set].keep_indices.size());
}

absl::Status ViewDestination(const Destination& destination, const ReplyContext& context,
                             LayerResult& out) {
  if (destination.k.block_size > 0 || destination.v.block_size > 0) return absl::OkStatus();
  for (int64_t head = 0; head < context.num_kv_heads; ++head) {
    GatheredHead view;
    view.num_tokens = SetTokens(out, head);
    if (view.num_tokens > destination.capacity_tokens) {
      return BadReply(out.layer,
                      absl::StrCat(view.num_tokens, " tokens gathered into a capacity of ",
                                   destination.capacity_tokens));
    }
    const auto place = [&](const KvTensor& tensor, int64_t row_bytes, const std::byte*& begin,
                           int64_t& stride_bytes) {
      const int64_t element = DTypeBytes(tensor.dtype);
      const bool contiguous = tensor.head_stride == 0 && tensor.token_stride == 0;
      stride_bytes = contiguous ? row_bytes : tensor.token_stride * element;
      const int64_t head_bytes =
          contiguous ? destination.capacity_tokens * row_bytes : tensor.head_stride * element;
      begin = static_cast<const std::byte*>(tensor.data) + head * head_bytes;
    };
    place(destination.k, context.k_row_bytes, view.k, view.k_row_bytes);
    place(destination.v, context.v_row_bytes, view.v, view.v_row_bytes);
    out.gathered.push_back(view);
  }
  return absl::OkStatus();
}

absl::Status ViewInline(std::string k, std::string v, const ReplyContext& context,
                        LayerResult& out) {
  int64_t tokens = 0;
  for (int64_t head = 0; head < context.num_kv_heads; ++head) tokens += SetTokens(out, head);
  if (static_cast<int64_t>(k.size()) != tokens * context.k_row_bytes ||
      static_cast<int64_t>(v.size()) != tokens * context.v_row_bytes) {
    return BadReply(out.layer, absl::StrCat("gathered K and V of ", k.size(), " and ", v.size(),
                                            " bytes, want ", tokens * context.k_row_bytes, " and ",
                                            tokens * context.v_row_bytes));
  }
  out.owned_k = std::make_shared<const std::string>(std::move(k));
  out.owned_v = std::make_shared<const std::string>(std::move(v));
  const auto* k_row = reinterpret_cast<const std::byte*>(out.owned_k->data());
  const auto* v_row = reinterpret_cast<const std::byte*>(out.owned_v->data());
  for (int64_t head = 0; head < context.num_kv_heads; ++head) {
    const int64_t rows = SetTokens(out, head);
    out.gathered.push_back({k_row, v_row, context.k_row_bytes, context.v_row_bytes, rows});
    k_row += rows * context.k_row_bytes;
    v_row += rows * context.v_row_bytes;
  }
  return absl::OkStatus();
}

bool IsEmpty(const TablePin& pin) {
  return pin.name.empty() && pin.version.empty() && pin.digest.empty() && pin.alias.empty();
}

void EncodePin(const TablePin& pin, v1::TablePin* out) {
  out->set_name(pin.name);
  out->set_version(pin.version);
  out->set_digest(pin.digest);
  out->set_alias(pin.alias);
}

TableIdentity DecodeIdentity(const v1::TableIdentity& table) {
  return {table.name(), table.version(), table.digest(), table.source()};
}

absl::StatusOr<ShadowResult> DecodeShadow(const v1::ShadowResult& shadow) {
  ShadowResult out;
  if (!shadow.error().empty()) {
    out.error = shadow.error();
    return out;
  }
  // Also false for NaN.
  if (!(shadow.kept_overlap() >= 0.0 && shadow.kept_overlap() <= 1.0)) {
    return absl::InternalError(
        absl::StrCat("reply: shadow kept_overlap=", shadow.kept_overlap(), ", want 0..1"));
  }
  out.table = DecodeIdentity(shadow.table());
  out.kept_overlap = shadow.kept_overlap();
  out.would_be_bytes = shadow.would_be_bytes();
  return out;
}

}  // namespace

void EncodeSpec(const OperationSpec& spec, v1::OperationSpec* out) {
  out->set_request_id(spec.request_id);
  out->set_request_generation(spec.request_generation);
  v1::ModelFingerprint* model = out->mutable_model();
  model->set_architecture(spec.model.architecture);
  model->set_num_layers(spec.model.num_layers);
  model->set_num_qo_heads(spec.model.num_qo_heads);
  model->set_num_kv_heads(spec.model.num_kv_heads);
  model->set_head_dim(spec.model.head_dim);
  model->set_rope_json(spec.model.rope_json);
  model->set_revision(spec.model.revision);
  out->set_seq_len(spec.seq_len);
  out->set_num_rows(spec.num_rows);
  out->mutable_row_positions()->Add(spec.row_positions.begin(), spec.row_positions.end());
  out->set_softmax_scale(spec.softmax_scale);
  out->set_kv_dtype(static_cast<v1::DType>(spec.kv_dtype));
  out->set_value_head_dim(spec.value_head_dim);
  out->mutable_block_table()->Add(spec.block_table.begin(), spec.block_table.end());
  out->set_policy(spec.policy);
  out->mutable_parameters()->insert(spec.parameters.begin(), spec.parameters.end());
  switch (spec.budget.kind) {
    case Budget::Kind::kTableDefault:
      break;
    case Budget::Kind::kTokens:
      out->mutable_budget()->set_tokens(spec.budget.tokens);
      break;
    case Budget::Kind::kKeptFraction:
      out->mutable_budget()->set_kept_fraction(spec.budget.kept_fraction);
      break;
    case Budget::Kind::kBytes:
      out->mutable_budget()->set_bytes(spec.budget.bytes);
      break;
  }
  out->set_scope(static_cast<v1::Scope>(spec.scope));
  out->set_protect_sink(spec.protect_sink);
  out->set_protect_window(spec.protect_window);
  for (const ProtectedSpan& span : spec.protect_spans) {
    v1::Span* added = out->add_protect_spans();
    added->set_name(span.name);
    added->set_begin(span.begin);
    added->set_end(span.end);
  }
  if (spec.ppl.has_value()) out->set_ppl(*spec.ppl);
  out->mutable_window_logprobs()->Add(spec.window_logprobs.begin(), spec.window_logprobs.end());
  if (!IsEmpty(spec.table)) EncodePin(spec.table, out->mutable_table());
  if (spec.shadow_table.has_value()) EncodePin(*spec.shadow_table, out->mutable_shadow_table());
  out->set_mode(spec.mode == Mode::kShadow ? v1::MODE_SHADOW : v1::MODE_DECIDE);
  out->set_gather(static_cast<v1::GatherMode>(spec.gather));
  out->set_deadline_ms(spec.deadline_ms);
  out->set_shared_prefix_tokens(spec.shared_prefix_tokens);
  for (const LayerGroup& group : spec.layer_groups) {
    v1::LayerGroup* added = out->add_layer_groups();
    added->mutable_layers()->Add(group.layers.begin(), group.layers.end());
    added->set_attention(static_cast<v1::AttentionKind>(group.attention));
    added->set_window(group.window);
    added->set_left_out(group.left_out);
  }
}

absl::Status EncodeLayer(const LayerInput& layer, const RegionResolver& resolve,
                         KvPlacement placement, v1::LayerInput* out) {
  const int64_t l = layer.layer;
  out->set_layer(l);
  out->mutable_qo_heads()->Add(layer.qo_heads.begin(), layer.qo_heads.end());
  if (layer.q_window.data != nullptr) {
    KEEPSET_RETURN_IF_ERROR(
        EncodeRows(l, "q_window", layer.q_window, resolve, out->mutable_q_window()));
  }
  if (layer.window_lse.data != nullptr) {
    KEEPSET_RETURN_IF_ERROR(
        EncodeRows(l, "window_lse", layer.window_lse, resolve, out->mutable_window_lse()));
    out->set_lse_base(layer.lse_base == LseBase::kTwo ? v1::LSE_BASE_2 : v1::LSE_BASE_E);
  }
  if (layer.attn_tile.data != nullptr) {
    KEEPSET_RETURN_IF_ERROR(
        EncodeRows(l, "attn_tile", layer.attn_tile, resolve, out->mutable_attn_tile()));
  }
  if (layer.column_stats.data != nullptr) {
    KEEPSET_RETURN_IF_ERROR(
        EncodeRows(l, "column_stats", layer.column_stats, resolve, out->mutable_column_stats()));
    out->set_column_reduction(layer.column_reduction == ColumnReduction::kSum
                                  ? v1::COLUMN_REDUCTION_SUM
                                  : v1::COLUMN_REDUCTION_MEAN);
  }
  if (layer.k.data != nullptr) {
    KEEPSET_RETURN_IF_ERROR(EncodeKv(l, "k", layer.k, resolve, placement, out->mutable_k()));
  }
  if (layer.v.data != nullptr) {
    KEEPSET_RETURN_IF_ERROR(EncodeKv(l, "v", layer.v, resolve, placement, out->mutable_v()));
  }
  if (layer.destination.has_value()) {
    const Destination& destination = *layer.destination;
    v1::LayerInput::Destination* encoded = out->mutable_destination();
    KEEPSET_RETURN_IF_ERROR(EncodeKv(l, "destination k", destination.k, resolve,
                                     KvPlacement::kRegionsOnly, encoded->mutable_k()));
    KEEPSET_RETURN_IF_ERROR(EncodeKv(l, "destination v", destination.v, resolve,
                                     KvPlacement::kRegionsOnly, encoded->mutable_v()));
    encoded->set_capacity_tokens(destination.capacity_tokens);
  }
  return absl::OkStatus();
}

ReplyContext MakeReplyContext(const OperationSpec& spec) {
  ReplyContext context;
  context.seq_len = spec.seq_len;
  context.num_layers = spec.model.num_layers;
  context.num_kv_heads = spec.model.num_kv_heads;
  const int64_t element = DTypeBytes(spec.kv_dtype);
  context.k_row_bytes = spec.model.head_dim * element;
  context.v_row_bytes =
      (spec.value_head_dim > 0 ? spec.value_head_dim : spec.model.head_dim) * element;
  context.gather = spec.gather;
  context.destinations.resize(spec.model.num_layers > 0 ? spec.model.num_layers : 0);
  return context;
}

void NoteDestination(const LayerInput& layer, ReplyContext& context) {
  if (layer.layer < 0 || layer.layer >= context.num_layers) return;
  context.destinations[layer.layer] = layer.destination;
  if (context.gather == GatherMode::kInPlace) {
    context.destinations[layer.layer] = Destination{layer.k, layer.v, context.seq_len};
  }
}

absl::StatusOr<LayerResult> DecodeLayer(v1::LayerResult& layer, const ReplyContext& context) {
  LayerResult out;
  out.layer = layer.layer();
  if (out.layer >= context.num_layers) {
    return BadReply(out.layer, absl::StrCat("the request has ", context.num_layers, " layers"));
  }
  if (layer.sets_size() != 1 && layer.sets_size() != context.num_kv_heads) {
    return BadReply(
        out.layer, absl::StrCat(layer.sets_size(), " keep sets, want 1 or ", context.num_kv_heads));
  }
  for (const v1::KeepSet& set : layer.sets()) {
    KEEPSET_ASSIGN_OR_RETURN(KeepSet decoded, DecodeSet(set, out.layer, context.seq_len));
    out.sets.push_back(std::move(decoded));
  }
  if (layer.has_tau()) out.tau = layer.tau();
  if (layer.has_entropy()) out.entropy = layer.entropy();
  if (layer.has_entropy_bin()) out.entropy_bin = layer.entropy_bin();
  if (!layer.k().empty() || !layer.v().empty()) {
    KEEPSET_RETURN_IF_ERROR(
        ViewInline(std::move(*layer.mutable_k()), std::move(*layer.mutable_v()), context, out));
  }
  return out;
}

absl::StatusOr<OperationResult> DecodeResult(v1::OperationResult& result,
                                             const ReplyContext& context) {
  OperationResult out;
  switch (result.outcome()) {
    case v1::OUTCOME_COMPRESSED:
      out.outcome = Outcome::kCompressed;
      break;
    case v1::OUTCOME_KEPT_FULL:
      out.outcome = Outcome::kKeptFull;
      break;
    case v1::OUTCOME_SHADOW:
      out.outcome = Outcome::kShadow;
      break;
    default:
      return absl::InternalError(absl::StrCat("reply: unknown outcome ", result.outcome()));
  }
  if (result.reason() < v1::REASON_NONE || result.reason() > v1::REASON_DEVICE_FAULT) {
    return absl::InternalError(absl::StrCat("reply: unknown reason ", result.reason()));
  }
  out.reason = static_cast<Reason>(result.reason());
  out.policy = result.policy();
  if (result.scope() < v1::SCOPE_UNSPECIFIED || result.scope() > v1::SCOPE_KV_HEAD) {
    return absl::InternalError(absl::StrCat("reply: unknown scope ", result.scope()));
  }
  out.scope = static_cast<Scope>(result.scope());
  out.seq_len = result.seq_len();
  if (out.seq_len != context.seq_len) {
    return absl::InternalError(
        absl::StrCat("reply: seq_len=", out.seq_len, ", want ", context.seq_len));
  }
  out.budget_tokens = result.budget_tokens();
  if (result.has_table()) out.table = DecodeIdentity(result.table());
  if (result.has_entropy()) out.entropy = result.entropy();
  if (result.has_ppl()) out.ppl = result.ppl();
  if (result.has_entropy_bin()) out.entropy_bin = result.entropy_bin();
  if (result.has_ppl_bin()) out.ppl_bin = result.ppl_bin();
  if (result.has_outside_mass()) out.outside_mass = result.outside_mass();
  if (result.has_predicted_miss_rate()) out.predicted_miss_rate = result.predicted_miss_rate();
  out.has_candidates = result.has_candidates();
  if (result.layers_size() != context.num_layers) {
    return absl::InternalError(
        absl::StrCat("reply: ", result.layers_size(), " layers, want ", context.num_layers));
  }
  for (int64_t l = 0; l < context.num_layers; ++l) {
    v1::LayerResult& encoded = *result.mutable_layers(l);
    if (encoded.layer() != l) return BadReply(encoded.layer(), absl::StrCat("want layer ", l));
    KEEPSET_ASSIGN_OR_RETURN(LayerResult layer, DecodeLayer(encoded, context));
    // Kept full means that nothing was moved: the caller's own cache is the answer.
    const bool in_memory =
        context.gather == GatherMode::kDestination || context.gather == GatherMode::kInPlace;
    const bool moved =
        in_memory && context.destinations[l].has_value() && out.outcome == Outcome::kCompressed;
    if (moved) {
      KEEPSET_RETURN_IF_ERROR(ViewDestination(*context.destinations[l], context, layer));
    }
    out.layers.push_back(std::move(layer));
  }
  for (const std::string& input : result.defaulted_inputs()) out.defaulted_inputs.push_back(input);
  for (const std::string& relaxed : result.relaxed()) out.relaxed.push_back(relaxed);
  out.backend = result.backend();
  out.transport = result.transport();
  out.bytes_before = result.bytes_before();
  out.bytes_after = result.bytes_after();
  out.stages = {result.stages().queue(), result.stages().lease(), result.stages().score(),
                result.stages().select(), result.stages().gather()};
  if (result.has_shadow()) {
    KEEPSET_ASSIGN_OR_RETURN(out.shadow, DecodeShadow(result.shadow()));
  }
  out.layers_left_out.assign(result.layers_left_out().begin(), result.layers_left_out().end());
  return out;
}

InputNeeds DecodeNeeds(const v1::GetRequirementsResponse& wire) {
  InputNeeds needs;
  for (const v1::LayerRequirements& one : wire.layers()) {
    InputNeeds::Layer layer;
    layer.layer = one.layer();
    layer.queries = one.queries();
    layer.keys = one.keys();
    layer.values = one.values();
    layer.columns = one.column_stats();
    layer.qo_heads.assign(one.qo_heads().begin(), one.qo_heads().end());
    layer.kv_heads.assign(one.kv_heads().begin(), one.kv_heads().end());
    needs.layers.push_back(std::move(layer));
  }
  needs.max_rows = static_cast<int64_t>(wire.max_rows());
  needs.ppl = wire.ppl();
  needs.last_row = wire.last_row();
  needs.observed_rows = wire.observed_rows();
  needs.probe_rows = wire.probe_rows();
  needs.probe_name = wire.probe_name();
  needs.probe_text = wire.probe_text();
  if (wire.has_table()) needs.table = DecodeIdentity(wire.table());
  return needs;
}

}  // namespace keepset::client
