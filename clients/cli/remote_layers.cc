#include "clients/cli/remote_layers.h"

#include <cstring>
#include <utility>

#include "base/status_macros.h"

namespace keepset::cli {
namespace {

client::RowsTensor ToRows(const keepset_rows_view& view) {
  return {view.data, view.size_bytes, static_cast<client::DType>(view.dtype), view.head_stride,
          view.row_stride};
}

client::KvTensor ToKv(const keepset_kv_view& view) {
  client::KvTensor out;
  out.data = view.data;
  out.size_bytes = view.size_bytes;
  out.dtype = static_cast<client::DType>(view.dtype);
  out.head_stride = view.head_stride;
  out.token_stride = view.token_stride;
  out.block_size = view.block_size;
  out.block_stride = view.block_stride;
  if (view.block_table != nullptr) {
    out.block_table.assign(view.block_table, view.block_table + view.num_blocks);
  }
  return out;
}

template <typename Visit>
absl::Status ForEachTensor(client::LayerInput& input, Visit visit) {
  for (client::RowsTensor* rows : {&input.q_window, &input.window_lse, &input.attn_tile}) {
    if (rows->data != nullptr) KEEPSET_RETURN_IF_ERROR(visit(*rows));
  }
  for (client::KvTensor* kv : {&input.k, &input.v}) {
    if (kv->data != nullptr) KEEPSET_RETURN_IF_ERROR(visit(*kv));
  }
  return absl::OkStatus();
}

}  // namespace

client::LayerInput ToLayerInput(int64_t layer, const keepset_layer_observation& observation) {
  client::LayerInput input;
  input.layer = layer;
  input.q_window = ToRows(observation.q_window);
  input.window_lse = ToRows(observation.window_lse);
  input.attn_tile = ToRows(observation.attn_tile);
  input.k = ToKv(observation.k);
  input.v = ToKv(observation.v);
  return input;
}

absl::StatusOr<RemoteLayers> PlaceLayers(client::Client& client,
                                         std::vector<client::LayerInput> inputs, int64_t seq_len,
                                         GatherWish gather) {
  using client::SharedRegion;
  RemoteLayers out;
  out.inputs = std::move(inputs);
  if (client.transport() != client::Transport::kMemfd) return out;

  int64_t source_bytes = 0;
  int64_t destination_bytes = 0;
  for (client::LayerInput& input : out.inputs) {
    KEEPSET_RETURN_IF_ERROR(ForEachTensor(input, [&](auto& tensor) {
      source_bytes += SharedRegion::AllocationBytes(tensor.size_bytes);
      return absl::OkStatus();
    }));
    destination_bytes += SharedRegion::AllocationBytes(input.k.size_bytes) +
                         SharedRegion::AllocationBytes(input.v.size_bytes);
  }
  if (source_bytes > 0) {
    KEEPSET_ASSIGN_OR_RETURN(out.source, SharedRegion::Create("keepset-capture", source_bytes));
    for (client::LayerInput& input : out.inputs) {
      KEEPSET_RETURN_IF_ERROR(ForEachTensor(input, [&](auto& tensor) -> absl::Status {
        KEEPSET_ASSIGN_OR_RETURN(std::byte* const place, out.source->Allocate(tensor.size_bytes));
        std::memcpy(place, tensor.data, tensor.size_bytes);
        tensor.data = place;
        return absl::OkStatus();
      }));
    }
    KEEPSET_RETURN_IF_ERROR(
        client.RegisterRegion(*out.source, "capture", client::RegionAccess::kReadOnly));
  }
  if (gather == GatherWish::kKeptRows && destination_bytes > 0) {
    KEEPSET_ASSIGN_OR_RETURN(out.destination,
                             SharedRegion::Create("keepset-kept-rows", destination_bytes));
    for (client::LayerInput& input : out.inputs) {
      if (input.k.data == nullptr || input.v.data == nullptr) continue;
      client::Destination destination{input.k, input.v, seq_len};
      for (client::KvTensor* tensor : {&destination.k, &destination.v}) {
        KEEPSET_ASSIGN_OR_RETURN(std::byte* const place,
                                 out.destination->Allocate(tensor->size_bytes));
        tensor->data = place;
      }
      input.destination = std::move(destination);
    }
    KEEPSET_RETURN_IF_ERROR(
        client.RegisterRegion(*out.destination, "kept-rows", client::RegionAccess::kReadWrite));
  }
  return out;
}

}  // namespace keepset::cli
