#include "clients/cli/prefill_request.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "clients/cli/exit_status.h"

namespace keepset::cli {

absl::StatusOr<std::unique_ptr<PrefillRequest>> PrefillRequest::Open(
    const CompressOptions& options) {
  KEEPSET_ASSIGN_OR_RETURN(CaptureHandle capture, OpenCapture(options.capture));
  std::unique_ptr<PrefillRequest> request(new PrefillRequest(std::move(capture)));
  KEEPSET_RETURN_IF_ERROR(request->Fill(options));
  return request;
}

absl::Status PrefillRequest::Fill(const CompressOptions& options) {
  spec_.struct_size = sizeof(spec_);
  spec_.ppl = std::nan("");
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_capture_fill_spec(capture_.get(), &spec_)));
  KEEPSET_RETURN_IF_ERROR(ReadModel());
  spec_.policy = options.policy.c_str();
  for (const auto& [name, value] : options.parameters) {
    parameters_.push_back({name.c_str(), value.c_str()});
  }
  if (options.observe_span.has_value()) {
    keepset_span span = {};
    KEEPSET_RETURN_IF_ERROR(
        FromEngine(keepset_capture_span(capture_.get(), options.observe_span->c_str(), &span)));
    observe_ = absl::StrCat(span.begin, ":", span.end);
    parameters_.push_back({"observe", observe_.c_str()});
  }
  spec_.parameters = parameters_.data();
  spec_.num_parameters = parameters_.size();
  if (options.budget.has_value()) {
    spec_.budget_kind = KEEPSET_BUDGET_TOKENS;
    spec_.budget = *options.budget;
  } else if (options.kept_fraction.has_value()) {
    spec_.budget_kind = KEEPSET_BUDGET_KEPT_FRACTION;
    spec_.kept_fraction = *options.kept_fraction;
  } else if (options.budget_bytes.has_value()) {
    spec_.budget_kind = KEEPSET_BUDGET_BYTES;
    spec_.budget = *options.budget_bytes;
  }
  // Unsigned on the wire: a negative count has to be refused before it gets there.
  struct Count {
    const char* flag;
    std::optional<int64_t> value;
    int64_t least;
  };
  for (const auto& [flag, value, least] :
       {Count{"--budget", options.budget, 1}, Count{"--budget-bytes", options.budget_bytes, 1},
        Count{"--protect-sink", options.protect_sink, 0},
        Count{"--protect-window", options.protect_window, 0}}) {
    if (value.value_or(least) < least) {
      return RefusedError(absl::StrCat(flag, "=", *value, ", want ", least, " or more"));
    }
  }
  if (options.scope.has_value()) spec_.scope = options.scope->c_str();
  spec_.protect_sink = options.protect_sink;
  spec_.protect_window = options.protect_window;
  for (const std::string& name : options.protect_spans) {
    keepset_span span = {};
    KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_capture_span(capture_.get(), name.c_str(), &span)));
    spans_.push_back(span);
  }
  spec_.protect_spans = spans_.data();
  spec_.num_protect_spans = spans_.size();
  if (options.ppl.has_value()) spec_.ppl = *options.ppl;
  spec_.shadow = options.shadow ? 1 : 0;
  return absl::OkStatus();
}

absl::Status PrefillRequest::ReadModel() {
  const nlohmann::json model = nlohmann::json::parse(spec_.model_json, nullptr, false);
  if (!model.is_object()) return absl::InternalError("capture: its model is not a JSON object");
  const auto count = [&model](const char* key) -> int64_t {
    const auto found = model.find(key);
    return found != model.end() && found->is_number_integer() ? found->get<int64_t>() : 0;
  };
  const auto text = [&model](const char* key) -> std::string {
    const auto found = model.find(key);
    return found != model.end() && found->is_string() ? found->get<std::string>() : "";
  };
  model_.architecture = text("architecture");
  model_.num_layers = count("num_layers");
  model_.num_qo_heads = count("num_qo_heads");
  model_.num_kv_heads = count("num_kv_heads");
  model_.head_dim = count("head_dim");
  if (const auto rope = model.find("rope"); rope != model.end() && rope->is_object()) {
    model_.rope_json = rope->dump();
  }
  model_.revision = text("revision");
  return absl::OkStatus();
}

absl::StatusOr<keepset_layer_observation> PrefillRequest::Layer(int64_t layer) const {
  keepset_layer_observation observation = {};
  observation.struct_size = sizeof(observation);
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_capture_layer(capture_.get(), layer, &observation)));
  return observation;
}

client::OperationSpec PrefillRequest::ClientSpec() const {
  client::OperationSpec out;
  out.model = model_;
  out.seq_len = spec_.seq_len;
  out.num_rows = spec_.num_rows;
  if (spec_.row_positions != nullptr) {
    out.row_positions.assign(spec_.row_positions, spec_.row_positions + spec_.num_rows);
  }
  out.softmax_scale = spec_.softmax_scale;
  out.kv_dtype = static_cast<client::DType>(spec_.kv_dtype);
  out.value_head_dim = spec_.value_head_dim;
  out.policy = spec_.policy;
  for (const keepset_parameter& parameter : parameters_) {
    out.parameters[parameter.name] = parameter.value;
  }
  switch (spec_.budget_kind) {
    case KEEPSET_BUDGET_TOKENS:
      out.budget.kind = client::Budget::Kind::kTokens;
      out.budget.tokens = spec_.budget;
      break;
    case KEEPSET_BUDGET_KEPT_FRACTION:
      out.budget.kind = client::Budget::Kind::kKeptFraction;
      out.budget.kept_fraction = spec_.kept_fraction;
      break;
    case KEEPSET_BUDGET_BYTES:
      out.budget.kind = client::Budget::Kind::kBytes;
      out.budget.bytes = spec_.budget;
      break;
    default:
      break;
  }
  if (spec_.scope != nullptr) {
    out.scope = client::ParseScope(spec_.scope).value_or(client::Scope::kNative);
  }
  out.protect_sink = spec_.protect_sink;
  out.protect_window = spec_.protect_window;
  for (const keepset_span& span : spans_) {
    out.protect_spans.push_back({span.name == nullptr ? "" : span.name, span.begin, span.end});
  }
  if (!std::isnan(spec_.ppl)) out.ppl = spec_.ppl;
  if (spec_.window_logprobs != nullptr) {
    out.window_logprobs.assign(spec_.window_logprobs,
                               spec_.window_logprobs + spec_.num_window_logprobs);
  }
  out.mode = spec_.shadow != 0 ? client::Mode::kShadow : client::Mode::kDecide;
  return out;
}

}  // namespace keepset::cli
