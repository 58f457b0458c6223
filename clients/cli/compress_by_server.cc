#include <memory>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "clients/cli/compress_answer.h"
#include "clients/cli/engine_handles.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/remote_layers.h"
#include "clients/cli/remote_result_json.h"
#include "clients/cli/server_connection.h"

namespace keepset::cli {
namespace {

constexpr absl::Duration kCallTimeout = absl::Minutes(10);

// One set's rows from where they were gathered, contiguous.
AnswerRows CopyRows(const client::LayerResult& layer, int64_t set,
                    const std::vector<client::GatheredHead>& heads, int64_t k_row_bytes,
                    int64_t v_row_bytes) {
  AnswerRows rows;
  rows.layer = layer.layer;
  rows.set = set;
  rows.num_tokens = heads.front().num_tokens;
  for (const client::GatheredHead& head : heads) {
    for (int64_t row = 0; row < head.num_tokens; ++row) {
      const std::byte* k = head.k + row * head.k_row_bytes;
      const std::byte* v = head.v + row * head.v_row_bytes;
      rows.k.insert(rows.k.end(), k, k + k_row_bytes);
      rows.v.insert(rows.v.end(), v, v + v_row_bytes);
    }
  }
  return rows;
}

// Everything is kept and the server moved nothing: the rows are the capture's own.
std::vector<client::GatheredHead> OwnRows(const client::LayerInput& input, int64_t num_kv_heads,
                                          int64_t seq_len, int64_t k_row_bytes,
                                          int64_t v_row_bytes) {
  std::vector<client::GatheredHead> heads;
  for (int64_t head = 0; head < num_kv_heads; ++head) {
    const auto begin = [&](const client::KvTensor& tensor, int64_t row_bytes) {
      return static_cast<const std::byte*>(tensor.data) + head * seq_len * row_bytes;
    };
    heads.push_back({begin(input.k, k_row_bytes), begin(input.v, v_row_bytes), k_row_bytes,
                     v_row_bytes, seq_len});
  }
  return heads;
}

absl::Status TakeRows(const client::OperationSpec& spec,
                      const std::vector<client::LayerInput>& inputs,
                      const client::OperationResult& result, CompressAnswer& answer) {
  const int64_t element = client::DTypeBytes(spec.kv_dtype);
  const int64_t k_row_bytes = spec.model.head_dim * element;
  const int64_t v_row_bytes =
      (spec.value_head_dim > 0 ? spec.value_head_dim : spec.model.head_dim) * element;
  for (const client::LayerResult& layer : result.layers) {
    std::vector<client::GatheredHead> heads = layer.gathered;
    if (result.outcome == client::Outcome::kKeptFull) {
      heads = OwnRows(inputs[layer.layer], spec.model.num_kv_heads, spec.seq_len, k_row_bytes,
                      v_row_bytes);
    }
    if (heads.empty()) {
      return absl::InternalError(
          absl::StrCat("reply, layer ", layer.layer, ": the kept rows of K and V are missing"));
    }
    if (result.scope != client::Scope::kKvHead) {
      answer.rows.push_back(CopyRows(layer, kSharedSet, heads, k_row_bytes, v_row_bytes));
      continue;
    }
    for (size_t head = 0; head < heads.size(); ++head) {
      answer.rows.push_back(
          CopyRows(layer, static_cast<int64_t>(head), {heads[head]}, k_row_bytes, v_row_bytes));
    }
  }
  return absl::OkStatus();
}

absl::Status ExplainOperationError(const CompressOptions& options, const absl::Status& status) {
  if (absl::IsNotFound(status) && absl::StrContains(status.message(), "table") &&
      options.table.has_value()) {
    return absl::NotFoundError(absl::StrCat("table ", *options.table, " is not active on ",
                                            *options.server.address, ": ", status.message(),
                                            " (keepset info --server ", *options.server.address,
                                            " lists the active ones)"));
  }
  return status;
}

}  // namespace

absl::StatusOr<CompressAnswer> CompressByServer(const CompressOptions& options,
                                                const PrefillRequest& request) {
  client::OperationSpec spec = request.ClientSpec();
  spec.request_id = options.capture;
  spec.table = options.pin;
  spec.shadow_table = options.shadow_table;
  if (options.table.has_value()) {
    KEEPSET_ASSIGN_OR_RETURN(const TableHandle table, LoadTable(*options.table));
    spec.table.digest = keepset_table_digest(table.get());
  }
  client::ClientOptions client_options = options.server.Options();
  client_options.transport = options.transport;
  client_options.engine = absl::StrCat("keepset-cli ", keepset_version());
  client_options.call_timeout = kCallTimeout;
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<client::Client> client,
                           ConnectToServer(client_options));
  KEEPSET_ASSIGN_OR_RETURN(const client::ServerInfo info, client->GetServerInfo());
  KEEPSET_RETURN_IF_ERROR(CheckPolicyKnown(options.policy, info.policies));

  std::vector<client::LayerInput> inputs;
  for (int64_t layer = 0; layer < request.num_layers(); ++layer) {
    KEEPSET_ASSIGN_OR_RETURN(const keepset_layer_observation observation, request.Layer(layer));
    if (options.gather && (observation.k.data == nullptr || observation.v.data == nullptr)) {
      return RefusedError(absl::StrCat("layer ", layer, ": --gather needs k and v in the capture"));
    }
    inputs.push_back(ToLayerInput(layer, observation));
  }
  KEEPSET_ASSIGN_OR_RETURN(RemoteLayers layers,
                           PlaceLayers(*client, std::move(inputs), spec.seq_len,
                                       options.gather ? GatherWish::kKeptRows : GatherWish::kNone));
  if (options.gather) {
    spec.gather = layers.destination != nullptr ? client::GatherMode::kDestination
                                                : client::GatherMode::kInline;
  }
  absl::StatusOr<client::OperationResult> result = client->CompressUnary(spec, layers.inputs);
  if (!result.ok()) return ExplainOperationError(options, result.status());

  CompressAnswer answer;
  answer.transport = std::string(client::TransportName(client->transport()));
  answer.result_json = RemoteResultJson(*result);
  answer.shadow = result->shadow;
  for (client::LayerResult& layer : result->layers) {
    for (size_t set = 0; set < layer.sets.size(); ++set) {
      const bool per_head = result->scope == client::Scope::kKvHead;
      answer.sets.push_back({layer.layer, per_head ? static_cast<int64_t>(set) : kSharedSet,
                             std::move(layer.sets[set].keep_indices)});
    }
  }
  if (options.gather) KEEPSET_RETURN_IF_ERROR(TakeRows(spec, layers.inputs, *result, answer));
  answer.stage_seconds = {{"queue", result->stages.queue},
                          {"lease", result->stages.lease},
                          {"score", result->stages.score},
                          {"select", result->stages.select},
                          {"gather", result->stages.gather}};
  return answer;
}

}  // namespace keepset::cli
