// keepset.h: operations and results.
#include <cmath>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "base/status_macros.h"
#include "engine/c_abi/handles.h"
#include "engine/device_bytes.h"
#include "engine/input_needs.h"
#include "engine/result_json.h"
#include "tables/model_fingerprint.h"

namespace keepset::engine {
namespace {

absl::StatusOr<Budget> ToBudget(const keepset_operation_spec& from) {
  Budget budget;
  switch (from.budget_kind) {
    case KEEPSET_BUDGET_TABLE_DEFAULT:
      budget.kind = Budget::Kind::kTableDefault;
      return budget;
    case KEEPSET_BUDGET_TOKENS:
      budget.kind = Budget::Kind::kTokens;
      budget.tokens = from.budget;
      return budget;
    case KEEPSET_BUDGET_KEPT_FRACTION:
      budget.kind = Budget::Kind::kKeptFraction;
      budget.kept_fraction = from.kept_fraction;
      return budget;
    case KEEPSET_BUDGET_BYTES:
      budget.kind = Budget::Kind::kBytes;
      budget.bytes = from.budget;
      return budget;
    default:
      return absl::InvalidArgumentError(absl::StrCat("budget_kind=", from.budget_kind,
                                                     ", want 0 (table default), 1 (tokens), 2 "
                                                     "(kept fraction) or 3 (bytes)"));
  }
}

absl::Status AddParameters(const keepset_operation_spec& from, OperationSpec& spec) {
  if (from.num_parameters > 0) {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(from.parameters, "parameters"));
  }
  for (size_t i = 0; i < from.num_parameters; ++i) {
    const keepset_parameter& parameter = from.parameters[i];
    KEEPSET_RETURN_IF_ERROR(RequirePointer(parameter.name, "parameter name"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(parameter.value, "parameter value"));
    if (!spec.parameters.emplace(parameter.name, parameter.value).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("parameter ", parameter.name, " is given twice"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<OperationSpec> ToSpec(const keepset_operation_spec& from) {
  OperationSpec spec;
  KEEPSET_RETURN_IF_ERROR(RequirePointer(from.model_json, "model_json"));
  KEEPSET_RETURN_IF_ERROR(RequirePointer(from.policy, "policy"));
  KEEPSET_ASSIGN_OR_RETURN(spec.model, tables::ParseModelFingerprint(from.model_json, "model"));
  spec.seq_len = from.seq_len;
  spec.num_rows = from.num_rows;
  if (from.row_positions != nullptr && from.num_rows > 0) {
    spec.row_positions.assign(from.row_positions, from.row_positions + from.num_rows);
  }
  spec.softmax_scale = from.softmax_scale;
  KEEPSET_ASSIGN_OR_RETURN(spec.kv_dtype, ToDType(from.kv_dtype, "kv_dtype"));
  spec.value_head_dim = from.value_head_dim;
  spec.policy = from.policy;
  KEEPSET_RETURN_IF_ERROR(AddParameters(from, spec));
  KEEPSET_ASSIGN_OR_RETURN(spec.budget, ToBudget(from));
  if (from.scope != nullptr) {
    KEEPSET_ASSIGN_OR_RETURN(spec.scope, ParseScope(from.scope));
  }
  spec.protect_sink = from.protect_sink;
  spec.protect_window = from.protect_window;
  if (from.num_protect_spans > 0) {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(from.protect_spans, "protect_spans"));
  }
  for (size_t i = 0; i < from.num_protect_spans; ++i) {
    const keepset_span& span = from.protect_spans[i];
    spec.protect_spans.push_back({span.name == nullptr ? "" : span.name, span.begin, span.end});
  }
  if (!std::isnan(from.ppl)) spec.ppl = from.ppl;
  if (from.num_window_logprobs > 0) {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(from.window_logprobs, "window_logprobs"));
    spec.window_logprobs.assign(from.window_logprobs,
                                from.window_logprobs + from.num_window_logprobs);
  }
  if (from.table != nullptr) spec.table = from.table->table;
  if (from.shadow != 0 && from.shadow != 1) {
    return absl::InvalidArgumentError(absl::StrCat("shadow=", from.shadow, ", want 0 or 1"));
  }
  spec.mode = from.shadow == 1 ? Mode::kShadow : Mode::kDecide;
  if (from.struct_size >= offsetof(keepset_operation_spec, keep_full_on_short_memory)) {
    spec.device_stream = from.cuda_stream;
  }
  if (from.struct_size >= sizeof(from)) {
    const int32_t keep_full = from.keep_full_on_short_memory;
    if (keep_full != 0 && keep_full != 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("keep_full_on_short_memory=", keep_full, ", want 0 or 1"));
    }
    if (keep_full == 1) spec.on_short_memory = OnShortMemory::kKeepFull;
  }
  return spec;
}

absl::StatusOr<LayerObservation> ReadObservation(const keepset_layer_observation* observation,
                                                 int64_t layer) {
  KEEPSET_RETURN_IF_ERROR(RequirePointer(observation, "observation"));
  KEEPSET_RETURN_IF_ERROR(RequireStruct(observation->struct_size,
                                        offsetof(keepset_layer_observation, column_stats),
                                        "keepset_layer_observation"));
  return ToObservation(*observation, layer);
}

absl::StatusOr<LayerGather> ReadGather(int64_t layer, const keepset_kv_view* k,
                                       const keepset_kv_view* v, const keepset_kv_view* out_k,
                                       const keepset_kv_view* out_v) {
  KEEPSET_RETURN_IF_ERROR(RequirePointer(k, "k"));
  KEEPSET_RETURN_IF_ERROR(RequirePointer(v, "v"));
  KEEPSET_RETURN_IF_ERROR(RequirePointer(out_k, "out_k"));
  KEEPSET_RETURN_IF_ERROR(RequirePointer(out_v, "out_v"));
  const std::string where = absl::StrCat("layer ", layer, ": ");
  LayerGather gather;
  gather.layer = layer;
  KEEPSET_ASSIGN_OR_RETURN(gather.k, ToKvView(*k, absl::StrCat(where, "k")));
  KEEPSET_ASSIGN_OR_RETURN(gather.v, ToKvView(*v, absl::StrCat(where, "v")));
  KEEPSET_ASSIGN_OR_RETURN(gather.out_k, ToMutableKvView(*out_k, absl::StrCat(where, "out_k")));
  KEEPSET_ASSIGN_OR_RETURN(gather.out_v, ToMutableKvView(*out_v, absl::StrCat(where, "out_v")));
  return gather;
}

absl::StatusOr<LayerInPlace> ReadInPlace(int64_t layer, const keepset_kv_view* k,
                                         const keepset_kv_view* v) {
  KEEPSET_RETURN_IF_ERROR(RequirePointer(k, "k"));
  KEEPSET_RETURN_IF_ERROR(RequirePointer(v, "v"));
  const std::string where = absl::StrCat("layer ", layer, ": ");
  LayerInPlace in_place;
  in_place.layer = layer;
  KEEPSET_ASSIGN_OR_RETURN(in_place.k, ToMutableKvView(*k, absl::StrCat(where, "k")));
  KEEPSET_ASSIGN_OR_RETURN(in_place.v, ToMutableKvView(*v, absl::StrCat(where, "v")));
  return in_place;
}

absl::StatusOr<Handover> ToHandover(int32_t from) {
  if (from == KEEPSET_LAYERS_TOGETHER) return Handover::kTogether;
  if (from == KEEPSET_LAYERS_ONE_BY_ONE) return Handover::kOneByOne;
  return absl::InvalidArgumentError(absl::StrCat(
      "handover=", from, ", want KEEPSET_LAYERS_TOGETHER (0) or KEEPSET_LAYERS_ONE_BY_ONE (1)"));
}

absl::StatusOr<RowMove> ToRowMove(int32_t from) {
  if (from == KEEPSET_ROWS_GATHERED) return RowMove::kGather;
  if (from == KEEPSET_ROWS_IN_PLACE) return RowMove::kInPlace;
  if (from == KEEPSET_ROWS_STAY) return RowMove::kNone;
  return absl::InvalidArgumentError(absl::StrCat("row_move=", from,
                                                 ", want KEEPSET_ROWS_GATHERED (0), "
                                                 "KEEPSET_ROWS_IN_PLACE (1) or "
                                                 "KEEPSET_ROWS_STAY (2)"));
}

absl::StatusOr<DeviceBytesOptions> ToOptions(const keepset_device_bytes_options* from) {
  DeviceBytesOptions options;
  if (from == nullptr) return options;
  KEEPSET_RETURN_IF_ERROR(
      RequireStruct(from->struct_size, sizeof(*from), "keepset_device_bytes_options"));
  KEEPSET_ASSIGN_OR_RETURN(options.handover, ToHandover(from->handover));
  KEEPSET_ASSIGN_OR_RETURN(options.row_move, ToRowMove(from->row_move));
  if (from->layer != nullptr) {
    KEEPSET_ASSIGN_OR_RETURN(options.layer, ReadObservation(from->layer, 0));
  }
  return options;
}

// Where a gather left the caller's cache whole and the operation is to end so, the result says
// kept_full from now on: nobody reads "compressed" of rows that are nowhere.
absl::Status TakeBack(keepset_operation& operation) {
  if (operation.result.result->outcome != Outcome::kCompressed) return absl::OkStatus();
  if (!operation.backend->Health().ok()) {
    operation.operation->FinishKeptFull(Reason::kDeviceFault);
  } else if (operation.operation->is_short_of_memory()) {
    operation.operation->FinishKeptFull(Reason::kShed);
  }
  if (operation.result.result->outcome == Outcome::kCompressed) return absl::OkStatus();
  operation.superseded_json.swap(operation.result.json);
  // Finish makes it where there is no memory for it now.
  operation.result.json.clear();
  operation.result.json = ResultJson(*operation.result.result);
  return absl::OkStatus();
}

// Guard of a call that moves rows.
template <typename Call>
keepset_status GuardMove(keepset_operation* operation, const Call& call) {
  const absl::Status status = StatusOf(call);
  if (!status.ok() && operation != nullptr && operation->result.result != nullptr) {
    StatusOf([operation] { return TakeBack(*operation); }).IgnoreError();
  }
  return ReportStatus(status);
}

}  // namespace
}  // namespace keepset::engine

using ::keepset::engine::Guard;
using ::keepset::engine::GuardMove;
using ::keepset::engine::kLeastSpecBytes;
using ::keepset::engine::ReadGather;
using ::keepset::engine::ReadInPlace;
using ::keepset::engine::ReadObservation;
using ::keepset::engine::RequirePointer;
using ::keepset::engine::RequireStruct;

extern "C" {

keepset_status keepset_operation_begin(keepset_engine* engine, const keepset_operation_spec* spec,
                                       keepset_operation** out) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(engine, "engine"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(spec, "spec"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out, "out"));
    KEEPSET_RETURN_IF_ERROR(
        RequireStruct(spec->struct_size, kLeastSpecBytes, "keepset_operation_spec"));
    KEEPSET_ASSIGN_OR_RETURN(keepset::engine::OperationSpec converted,
                             keepset::engine::ToSpec(*spec));
    auto operation = std::make_unique<keepset_operation>();
    KEEPSET_ASSIGN_OR_RETURN(operation->operation, keepset::engine::Operation::Begin(
                                                       std::move(converted), *engine->policies,
                                                       *engine->backend, keepset::SystemClock()));
    operation->backend = engine->backend.get();
    *out = operation.release();
    return absl::OkStatus();
  });
}

keepset_status keepset_operation_device_bytes(keepset_engine* engine,
                                              const keepset_operation_spec* spec,
                                              const keepset_device_bytes_options* options,
                                              int64_t* out) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(engine, "engine"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(spec, "spec"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out, "out"));
    KEEPSET_RETURN_IF_ERROR(
        RequireStruct(spec->struct_size, kLeastSpecBytes, "keepset_operation_spec"));
    KEEPSET_ASSIGN_OR_RETURN(keepset::engine::OperationSpec converted,
                             keepset::engine::ToSpec(*spec));
    KEEPSET_ASSIGN_OR_RETURN(const keepset::engine::DeviceBytesOptions converted_options,
                             keepset::engine::ToOptions(options));
    KEEPSET_ASSIGN_OR_RETURN(*out,
                             keepset::engine::DeviceBytes(std::move(converted), converted_options,
                                                          *engine->policies, *engine->backend));
    return absl::OkStatus();
  });
}

keepset_status keepset_input_needs(keepset_engine* engine, const keepset_operation_spec* spec,
                                   keepset_report** out) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(engine, "engine"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(spec, "spec"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out, "out"));
    KEEPSET_RETURN_IF_ERROR(
        RequireStruct(spec->struct_size, kLeastSpecBytes, "keepset_operation_spec"));
    KEEPSET_ASSIGN_OR_RETURN(const keepset::engine::OperationSpec converted,
                             keepset::engine::ToSpec(*spec));
    KEEPSET_ASSIGN_OR_RETURN(const keepset::engine::InputNeeds needs,
                             keepset::engine::DescribeNeeds(converted, *engine->policies));
    auto report = std::make_unique<keepset_report>();
    report->json = keepset::engine::InputNeedsJson(needs);
    *out = report.release();
    return absl::OkStatus();
  });
}

keepset_status keepset_operation_observe(keepset_operation* operation, int64_t layer,
                                         const keepset_layer_observation* observation) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(operation, "operation"));
    KEEPSET_ASSIGN_OR_RETURN(const keepset::engine::LayerObservation converted,
                             ReadObservation(observation, layer));
    return operation->operation->Observe(layer, converted);
  });
}

keepset_status keepset_operation_observe_layers(
    keepset_operation* operation, const int64_t* layers,
    const keepset_layer_observation* const* observations, size_t num_layers) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(operation, "operation"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(layers, "layers"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(observations, "observations"));
    std::vector<keepset::engine::ObservedLayer> observed;
    absl::Status unread;
    for (size_t i = 0; i < num_layers && unread.ok(); ++i) {
      absl::StatusOr<keepset::engine::LayerObservation> converted =
          ReadObservation(observations[i], layers[i]);
      unread = converted.status();
      if (unread.ok()) observed.push_back({layers[i], *converted});
    }
    // What is wrong with the layers before comes first.
    KEEPSET_RETURN_IF_ERROR(operation->operation->ObserveLayers(observed));
    return unread;
  });
}

keepset_status keepset_operation_finish(keepset_operation* operation, const keepset_result** out) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(operation, "operation"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out, "out"));
    KEEPSET_ASSIGN_OR_RETURN(operation->result.result, operation->operation->Finish());
    if (operation->result.json.empty()) {
      operation->result.json = keepset::engine::ResultJson(*operation->result.result);
    }
    *out = &operation->result;
    return absl::OkStatus();
  });
}

keepset_status keepset_operation_gather(keepset_operation* operation, int64_t layer,
                                        const keepset_kv_view* k, const keepset_kv_view* v,
                                        const keepset_kv_view* out_k,
                                        const keepset_kv_view* out_v) {
  return GuardMove(operation, [&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(operation, "operation"));
    KEEPSET_ASSIGN_OR_RETURN(const keepset::engine::LayerGather gather,
                             ReadGather(layer, k, v, out_k, out_v));
    return operation->operation->GatherLayers(absl::MakeConstSpan(&gather, 1));
  });
}

keepset_status keepset_operation_gather_layers(keepset_operation* operation,
                                               const keepset_layer_gather* const* layers,
                                               size_t num_layers) {
  return GuardMove(operation, [&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(operation, "operation"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(layers, "layers"));
    std::vector<keepset::engine::LayerGather> gathers;
    for (size_t i = 0; i < num_layers; ++i) {
      KEEPSET_RETURN_IF_ERROR(RequirePointer(layers[i], "layer"));
      const keepset_layer_gather& one = *layers[i];
      KEEPSET_RETURN_IF_ERROR(RequireStruct(one.struct_size, sizeof(one), "keepset_layer_gather"));
      KEEPSET_ASSIGN_OR_RETURN(gathers.emplace_back(),
                               ReadGather(one.layer, one.k, one.v, one.out_k, one.out_v));
    }
    return operation->operation->GatherLayers(gathers);
  });
}

keepset_status keepset_operation_gather_in_place(keepset_operation* operation, int64_t layer,
                                                 const keepset_kv_view* k,
                                                 const keepset_kv_view* v) {
  return GuardMove(operation, [&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(operation, "operation"));
    KEEPSET_ASSIGN_OR_RETURN(const keepset::engine::LayerInPlace one, ReadInPlace(layer, k, v));
    return operation->operation->GatherInPlace(layer, one.k, one.v);
  });
}

keepset_status keepset_operation_reserve_in_place(keepset_operation* operation,
                                                  const keepset_layer_in_place* const* layers,
                                                  size_t num_layers) {
  return GuardMove(operation, [&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(operation, "operation"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(layers, "layers"));
    std::vector<keepset::engine::LayerInPlace> moves;
    for (size_t i = 0; i < num_layers; ++i) {
      KEEPSET_RETURN_IF_ERROR(RequirePointer(layers[i], "layer"));
      const keepset_layer_in_place& one = *layers[i];
      KEEPSET_RETURN_IF_ERROR(
          RequireStruct(one.struct_size, sizeof(one), "keepset_layer_in_place"));
      KEEPSET_ASSIGN_OR_RETURN(moves.emplace_back(), ReadInPlace(one.layer, one.k, one.v));
    }
    return operation->operation->ReserveInPlace(moves);
  });
}

void keepset_operation_destroy(keepset_operation* operation) { delete operation; }

const char* keepset_result_outcome(const keepset_result* result) {
  return keepset::engine::OutcomeName(result->result->outcome).data();
}

const char* keepset_result_reason(const keepset_result* result) {
  return keepset::engine::ReasonName(result->result->reason).data();
}

const char* keepset_result_json(const keepset_result* result) { return result->json.c_str(); }

int64_t keepset_result_num_layers(const keepset_result* result) {
  return static_cast<int64_t>(result->result->layers.size());
}

int64_t keepset_result_num_sets(const keepset_result* result) {
  return static_cast<int64_t>(result->result->layers.front().keep_indices.size());
}

keepset_status keepset_result_keep_indices(const keepset_result* result, int64_t layer, int64_t set,
                                           const int32_t** out, int64_t* out_count) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(result, "result"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out, "out"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out_count, "out_count"));
    const int64_t num_layers = keepset_result_num_layers(result);
    const int64_t num_sets = keepset_result_num_sets(result);
    if (layer < 0 || layer >= num_layers) {
      return absl::InvalidArgumentError(
          absl::StrCat("layer ", layer, ", want 0..", num_layers - 1));
    }
    if (set < 0 || set >= num_sets) {
      return absl::InvalidArgumentError(absl::StrCat("set ", set, ", want 0..", num_sets - 1));
    }
    const auto& indices = result->result->layers[layer].keep_indices[set];
    *out = indices.data();
    *out_count = static_cast<int64_t>(indices.size());
    return absl::OkStatus();
  });
}

double keepset_result_stage_seconds(const keepset_result* result, const char* stage) {
  const keepset::engine::StageTimes& times = result->result->times;
  const absl::string_view name = stage == nullptr ? "" : stage;
  if (name == "score") return absl::ToDoubleSeconds(times.score);
  if (name == "select") return absl::ToDoubleSeconds(times.select);
  if (name == "gather") return absl::ToDoubleSeconds(times.gather);
  return std::nan("");
}

}  // extern "C"
