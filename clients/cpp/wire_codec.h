// Translates between the client's plain structs and keepset.v1 messages. Replies are not trusted:
// counts, order and range of every keep set are checked against what was asked.
#ifndef KEEPSET_CLIENTS_CPP_WIRE_CODEC_H_
#define KEEPSET_CLIENTS_CPP_WIRE_CODEC_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/cpp/operation.h"
#include "keepset/v1/compression.pb.h"

namespace keepset::client {

// Fills the slice and answers true when [data, data + size) lies in a registered region.
using RegionResolver =
    std::function<bool(const void* data, int64_t size_bytes, v1::RegionSlice* slice)>;

// Whether K and V may travel inside the message.
enum class KvPlacement { kAnywhere, kRegionsOnly };

void EncodeSpec(const OperationSpec& spec, v1::OperationSpec* out);

// InvalidArgument: a view without bytes. FailedPrecondition: K or V outside every registered region
// with kRegionsOnly, or a destination outside every region.
absl::Status EncodeLayer(const LayerInput& layer, const RegionResolver& resolve,
                         KvPlacement placement, v1::LayerInput* out);

// What decoding a reply needs to know of its request.
struct ReplyContext {
  int64_t seq_len = 0;
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;
  int64_t k_row_bytes = 0;
  int64_t v_row_bytes = 0;
  GatherMode gather = GatherMode::kNone;
  // [num_layers]: where gathered rows are, the tensors themselves with GatherMode::kInPlace.
  std::vector<std::optional<Destination>> destinations;
};
ReplyContext MakeReplyContext(const OperationSpec& spec);
// Remembers where the rows of a layer that was sent will be.
void NoteDestination(const LayerInput& layer, ReplyContext& context);

// Internal: the reply contradicts itself or the request, naming layer and field. Takes gathered
// bytes out of `layer`.
absl::StatusOr<LayerResult> DecodeLayer(v1::LayerResult& layer, const ReplyContext& context);
absl::StatusOr<OperationResult> DecodeResult(v1::OperationResult& result,
                                             const ReplyContext& context);

InputNeeds DecodeNeeds(const v1::GetRequirementsResponse& wire);

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_WIRE_CODEC_H_
