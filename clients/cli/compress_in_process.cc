#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "clients/cli/compress_answer.h"
#include "clients/cli/engine_handles.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/flag_parser.h"

namespace keepset::cli {
namespace {

// A view of [num_heads, capacity, head_dim] over `storage`, which is sized to hold it.
keepset_kv_view ContiguousView(std::vector<std::byte>& storage, int32_t dtype, int64_t num_heads,
                               int64_t capacity, int64_t head_dim) {
  const int64_t bytes = num_heads * capacity * head_dim * (dtype == KEEPSET_F32 ? 4 : 2);
  storage.resize(bytes);
  keepset_kv_view view = {};
  view.data = storage.data();
  view.size_bytes = bytes;
  view.dtype = dtype;
  view.num_kv_heads = num_heads;
  view.seq_len = capacity;
  view.head_dim = head_dim;
  view.head_stride = capacity * head_dim;
  view.token_stride = head_dim;
  return view;
}

// One set that all KV heads share, or one of each.
enum class SetKind { kShared, kPerHead };

// How the document writes `kept`; with one KV head the number of sets does not tell.
SetKind SetKindOf(const nlohmann::json& document) {
  const auto layers = document.find("layers");
  const bool per_head = layers != document.end() && layers->is_array() && !layers->empty() &&
                        layers->front().is_object() && layers->front().contains("kept") &&
                        layers->front()["kept"].is_array();
  return per_head ? SetKind::kPerHead : SetKind::kShared;
}

absl::Status GatherLayer(keepset_operation* operation, const PrefillRequest& request, int64_t layer,
                         SetKind kind, const std::vector<int64_t>& counts, CompressAnswer& out) {
  KEEPSET_ASSIGN_OR_RETURN(const keepset_layer_observation source, request.Layer(layer));
  if (source.k.data == nullptr || source.v.data == nullptr) {
    return RefusedError(absl::StrCat("layer ", layer, ": --gather needs k and v in the capture"));
  }
  const int64_t capacity = *std::max_element(counts.begin(), counts.end());
  AnswerRows rows;
  const keepset_kv_view k =
      ContiguousView(rows.k, source.k.dtype, request.num_kv_heads(), capacity, request.head_dim());
  const keepset_kv_view v = ContiguousView(rows.v, source.v.dtype, request.num_kv_heads(), capacity,
                                           request.value_head_dim());
  KEEPSET_RETURN_IF_ERROR(
      FromEngine(keepset_operation_gather(operation, layer, &source.k, &source.v, &k, &v)));
  rows.layer = layer;
  if (kind == SetKind::kShared) {
    rows.num_tokens = capacity;
    out.rows.push_back(std::move(rows));
    return absl::OkStatus();
  }
  const int64_t element = source.k.dtype == KEEPSET_F32 ? 4 : 2;
  for (int64_t head = 0; head < request.num_kv_heads(); ++head) {
    const auto cut = [&](const std::vector<std::byte>& all, int64_t head_dim) {
      const std::byte* begin = all.data() + head * capacity * head_dim * element;
      return std::vector<std::byte>(begin, begin + counts[head] * head_dim * element);
    };
    out.rows.push_back({layer, head, counts[head], cut(rows.k, request.head_dim()),
                        cut(rows.v, request.value_head_dim())});
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckPolicyKnown(const std::string& policy, const std::vector<std::string>& known) {
  if (std::find(known.begin(), known.end(), policy) != known.end()) return absl::OkStatus();
  const std::string nearest = NearestName(policy, known);
  return UsageError(
      absl::StrCat("unknown policy --policy=", policy, ", want one of ", absl::StrJoin(known, ", "),
                   nearest.empty() ? "" : absl::StrCat("; did you mean ", nearest, "?")));
}

absl::StatusOr<CompressAnswer> CompressInProcess(const CompressOptions& options,
                                                 const PrefillRequest& request) {
  KEEPSET_ASSIGN_OR_RETURN(const EngineHandle engine, NewEngine(options.threads));
  KEEPSET_RETURN_IF_ERROR(CheckPolicyKnown(
      options.policy,
      absl::StrSplit(keepset_engine_policies(engine.get()), '\n', absl::SkipEmpty())));
  keepset_operation_spec spec = request.spec();
  TableHandle table;
  if (options.table.has_value()) {
    KEEPSET_ASSIGN_OR_RETURN(table, LoadTable(*options.table));
    spec.table = table.get();
  }
  keepset_operation* begun = nullptr;
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_operation_begin(engine.get(), &spec, &begun)));
  const OperationHandle operation(begun);
  for (int64_t layer = 0; layer < request.num_layers(); ++layer) {
    KEEPSET_ASSIGN_OR_RETURN(const keepset_layer_observation observation, request.Layer(layer));
    KEEPSET_RETURN_IF_ERROR(
        FromEngine(keepset_operation_observe(operation.get(), layer, &observation)));
  }
  const keepset_result* result = nullptr;
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_operation_finish(operation.get(), &result)));

  CompressAnswer answer;
  answer.transport = "in_process";
  answer.result_json = keepset_result_json(result);
  const nlohmann::json document = nlohmann::json::parse(answer.result_json, nullptr, false);
  if (!document.is_object()) return absl::InternalError("result: not a JSON object");
  const SetKind kind = SetKindOf(document);
  const int64_t num_sets = keepset_result_num_sets(result);
  for (int64_t layer = 0; layer < request.num_layers(); ++layer) {
    std::vector<int64_t> counts;
    for (int64_t set = 0; set < num_sets; ++set) {
      const int32_t* indices = nullptr;
      int64_t count = 0;
      KEEPSET_RETURN_IF_ERROR(
          FromEngine(keepset_result_keep_indices(result, layer, set, &indices, &count)));
      answer.sets.push_back(
          {layer, kind == SetKind::kPerHead ? set : kSharedSet, {indices, indices + count}});
      counts.push_back(count);
    }
    if (options.gather) {
      KEEPSET_RETURN_IF_ERROR(GatherLayer(operation.get(), request, layer, kind, counts, answer));
    }
  }
  for (const char* stage : {"score", "select", "gather"}) {
    answer.stage_seconds.emplace_back(stage, keepset_result_stage_seconds(result, stage));
  }
  return answer;
}

}  // namespace keepset::cli
