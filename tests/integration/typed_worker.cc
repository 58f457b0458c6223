#include "tests/integration/typed_worker.h"

#include <gtest/gtest.h>

#include <cstring>
#include <utility>

#include "engine/operation_types.h"
#include "tables/table_file.h"

namespace keepset::integration {
namespace {

client::DType TypedDType(kernels::DType dtype) {
  switch (dtype) {
    case kernels::DType::kF16:
      return client::DType::kF16;
    case kernels::DType::kBF16:
      return client::DType::kBF16;
    default:
      return client::DType::kF32;
  }
}

client::KvTensor TypedKv(const kernels::KvView& view) {
  client::KvTensor tensor;
  tensor.data = view.data;
  tensor.size_bytes = view.size_bytes;
  tensor.dtype = TypedDType(view.dtype);
  tensor.head_stride = view.head_stride;
  tensor.token_stride = view.token_stride;
  tensor.block_size = view.block_size;
  tensor.block_stride = view.block_stride;
  tensor.block_table.assign(view.block_table.begin(), view.block_table.end());
  return tensor;
}

}  // namespace

client::OperationSpec TypedSpec(const fakes::SyntheticPrompt& prompt, const std::string& policy,
                                int64_t budget_tokens) {
  const engine::OperationSpec spec = prompt.spec();
  client::OperationSpec typed;
  typed.request_id = "typed";
  typed.model.architecture = spec.model.architecture;
  typed.model.num_layers = spec.model.num_layers;
  typed.model.num_qo_heads = spec.model.num_qo_heads;
  typed.model.num_kv_heads = spec.model.num_kv_heads;
  typed.model.head_dim = spec.model.head_dim;
  typed.seq_len = spec.seq_len;
  typed.num_rows = spec.num_rows;
  typed.softmax_scale = spec.softmax_scale;
  typed.kv_dtype = TypedDType(spec.kv_dtype);
  typed.policy = policy;
  typed.budget.kind = client::Budget::Kind::kTokens;
  typed.budget.tokens = budget_tokens;
  typed.ppl = 10.0;
  return typed;
}

client::LayerInput TypedLayer(const fakes::SyntheticPrompt& prompt, int64_t layer) {
  const engine::LayerObservation observation = prompt.observation(layer);
  client::LayerInput typed;
  typed.layer = layer;
  typed.q_window.data = observation.q_window.data;
  typed.q_window.size_bytes = observation.q_window.size_bytes;
  typed.q_window.dtype = TypedDType(observation.q_window.dtype);
  typed.k = TypedKv(observation.k);
  typed.v = TypedKv(observation.v);
  return typed;
}

std::vector<client::LayerInput> TypedLayers(const fakes::SyntheticPrompt& prompt) {
  std::vector<client::LayerInput> layers;
  for (int64_t layer = 0; layer < prompt.shape().num_layers; ++layer) {
    layers.push_back(TypedLayer(prompt, layer));
  }
  return layers;
}

void MoveInto(client::SharedRegion& region, std::vector<client::LayerInput>& layers) {
  const auto move = [&](const void*& data, int64_t size_bytes) {
    const absl::StatusOr<std::byte*> place = region.Allocate(size_bytes);
    ASSERT_TRUE(place.ok()) << place.status();
    std::memcpy(*place, data, static_cast<size_t>(size_bytes));
    data = *place;
  };
  for (client::LayerInput& layer : layers) {
    move(layer.q_window.data, layer.q_window.size_bytes);
    move(layer.k.data, layer.k.size_bytes);
    move(layer.v.data, layer.v.size_bytes);
  }
}

std::unique_ptr<client::Client> ConnectTo(const std::string& address, client::Transport transport) {
  client::ClientOptions options;
  options.address = address;
  options.transport = transport;
  absl::StatusOr<std::unique_ptr<client::Client>> client = client::Client::Connect(options);
  EXPECT_TRUE(client.ok()) << client.status();
  return client.ok() ? *std::move(client) : nullptr;
}

std::string TableFileFor(const fakes::SyntheticPrompt& prompt, const std::string& name,
                         const std::string& version, float gate) {
  tables::CompilerKvTableContent content = tables::UniformTable(prompt.model(), 1.0f, gate);
  content.name = name;
  content.version = version;
  const absl::StatusOr<std::string> bytes = tables::SerializeTable(content);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  return bytes.ok() ? *bytes : "";
}

}  // namespace keepset::integration
