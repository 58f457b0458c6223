// Where gathered K and V go: layout of the inline form, checks on destinations. Stateless.
#ifndef KEEPSET_SERVICE_RPC_GATHER_CODEC_H_
#define KEEPSET_SERVICE_RPC_GATHER_CODEC_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/operation_types.h"
#include "kernels/views.h"
#include "service/rpc/request_codec.h"

namespace keepset::service {

// Bytes of [num_kv_heads, rows, head_dim] in the dtype of `source`.
int64_t InlineGatherBytes(const kernels::KvView& source, int64_t rows);

// Sizes `bytes` and views it as contiguous [num_kv_heads, rows, head_dim].
kernels::MutableKvView InlineDestination(const kernels::KvView& source, int64_t rows,
                                         std::string* bytes);

// [num_kv_heads, rows, row_bytes] with n_g rows used per head -> heads one after the other, each
// [n_g, row_bytes].
void CloseGaps(const engine::LayerResult& result, int64_t rows, int64_t row_bytes,
               std::string* bytes);

// InvalidArgument when a destination shares bytes with a source or with another destination of the
// operation, naming both. Paged tensors are compared block by block. GATHER_IN_PLACE: when any two
// tensors do.
absl::Status CheckNoOverlap(absl::Span<const DecodedLayer> layers, v1::GatherMode mode);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_GATHER_CODEC_H_
