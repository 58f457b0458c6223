// OperationCall: what Finish moves, into a destination, the reply, or the worker's own cache.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "service/rpc/gather_codec.h"
#include "service/rpc/operation_call.h"

namespace keepset::service {

absl::Status OperationCall::GatherLayers(const engine::OperationResult& result,
                                         v1::OperationResult* out) {
  if (wire_.gather() == v1::GATHER_IN_PLACE) {
    KEEPSET_RETURN_IF_ERROR(GatherInPlace());
    out->set_gathered(true);
    return absl::OkStatus();
  }
  const bool to_destination = wire_.gather() == v1::GATHER_DESTINATION;
  if (to_destination) {
    KEEPSET_RETURN_IF_ERROR(CheckNoOverlap(layers_, wire_.gather()));
    for (size_t l = 0; l < layers_.size(); ++l) {
      KEEPSET_ASSIGN_OR_RETURN(const int64_t rows, operation_->GatherRows(l));
      if (rows <= layers_[l].out_k.seq_len) continue;
      return absl::FailedPreconditionError(
          absl::StrCat("layer ", l, ": destination.capacity_tokens=", layers_[l].out_k.seq_len,
                       ", want ", rows));
    }
  }
  std::vector<engine::LayerGather> gathers;
  for (size_t l = 0; l < layers_.size(); ++l) {
    const DecodedLayer& layer = layers_[l];
    engine::LayerGather& gather = gathers.emplace_back();
    gather.layer = static_cast<int64_t>(l);
    gather.k = layer.observation.k;
    gather.v = layer.observation.v;
    gather.out_k = layer.out_k;
    gather.out_v = layer.out_v;
    if (!to_destination) KEEPSET_RETURN_IF_ERROR(MakeRoomInline(gather, out->mutable_layers(l)));
  }
  KEEPSET_RETURN_IF_ERROR(operation_->GatherLayers(gathers));
  if (!to_destination) {
    for (const engine::LayerGather& gather : gathers) {
      KEEPSET_RETURN_IF_ERROR(
          CloseInlineGaps(gather, result.layers[gather.layer], out->mutable_layers(gather.layer)));
    }
  }
  out->set_gathered(true);
  return absl::OkStatus();
}

// Everything that may be refused comes before the first row that moves.
absl::Status OperationCall::GatherInPlace() {
  KEEPSET_RETURN_IF_ERROR(CheckNoOverlap(layers_, wire_.gather()));
  KEEPSET_RETURN_IF_ERROR(context_.backend.Health());
  std::vector<engine::LayerInPlace> moves;
  for (size_t l = 0; l < layers_.size(); ++l) {
    moves.push_back({static_cast<int64_t>(l), layers_[l].out_k, layers_[l].out_v});
  }
  KEEPSET_RETURN_IF_ERROR(operation_->ReserveInPlace(moves));
  for (size_t l = 0; l < layers_.size(); ++l) {
    is_moving_ = true;
    KEEPSET_RETURN_IF_ERROR(operation_->GatherInPlace(l, layers_[l].out_k, layers_[l].out_v));
  }
  return absl::OkStatus();
}

absl::Status OperationCall::MakeRoomInline(engine::LayerGather& gather, v1::LayerResult* out) {
  KEEPSET_ASSIGN_OR_RETURN(const int64_t rows, operation_->GatherRows(gather.layer));
  gathered_bytes_ += InlineGatherBytes(gather.k, rows) + InlineGatherBytes(gather.v, rows);
  if (gathered_bytes_ > context_.codec.max_inline_bytes) {
    MarkReject(Reject::kInlineTooLarge);
    return absl::ResourceExhaustedError(absl::StrCat(
        "layer ", gather.layer, ": ", gathered_bytes_, " gathered bytes inline, want at most ",
        context_.codec.max_inline_bytes, "; larger results belong into a registered destination"));
  }
  gather.out_k = InlineDestination(gather.k, rows, out->mutable_k());
  gather.out_v = InlineDestination(gather.v, rows, out->mutable_v());
  return absl::OkStatus();
}

absl::Status OperationCall::CloseInlineGaps(const engine::LayerGather& gather,
                                            const engine::LayerResult& result,
                                            v1::LayerResult* out) const {
  if (result.keep_indices.size() <= 1) return absl::OkStatus();
  KEEPSET_ASSIGN_OR_RETURN(const int64_t rows, operation_->GatherRows(gather.layer));
  CloseGaps(result, rows, gather.k.head_dim * kernels::DTypeBytes(gather.k.dtype),
            out->mutable_k());
  CloseGaps(result, rows, gather.v.head_dim * kernels::DTypeBytes(gather.v.dtype),
            out->mutable_v());
  return absl::OkStatus();
}

}  // namespace keepset::service
