// Wire request -> engine types. Nothing of a request is trusted: enum values, sizes, strides,
// offsets and block ids are checked without overflow before a view is made.
//
// Stateless and thread-safe. Views borrow the request message and the regions of `RegionSource`.
#ifndef KEEPSET_SERVICE_RPC_REQUEST_CODEC_H_
#define KEEPSET_SERVICE_RPC_REQUEST_CODEC_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "engine/operation_types.h"
#include "keepset/v1/compression.pb.h"
#include "kernels/views.h"
#include "service/memory/memory_transport.h"
#include "tables/table_store.h"

namespace keepset::service {

struct CodecLimits {
  int64_t max_inline_bytes = int64_t{64} << 20;  // per operation
  int64_t max_seq_len = 1048576;
  int64_t max_layers = 1024;
};

// Entries that a request may list. Beyond them no prompt or policy is meant.
inline constexpr int kMaxProtectSpans = 4096;
inline constexpr int kMaxParameters = 256;
inline constexpr size_t kMaxRopeJsonBytes = 65536;

// The regions an operation holds leases on.
class RegionSource {
 public:
  virtual ~RegionSource() = default;
  // NotFound: not a region of the operation's session. The region outlives the operation.
  virtual absl::StatusOr<const MappedRegion*> Find(absl::string_view region_id) = 0;
};

// Everything but table and deadline. InvalidArgument names the field.
absl::StatusOr<engine::OperationSpec> DecodeSpec(const v1::OperationSpec& wire,
                                                 const CodecLimits& limits);

// The table `pin` names instead of what `query` named.
void ApplyPin(const v1::TablePin& pin, tables::TableQuery& query);

// Model, policy and parameters alone, for questions about an operation that is not begun.
absl::StatusOr<engine::OperationSpec> DecodeQuestion(const v1::OperationSpec& wire,
                                                     const CodecLimits& limits);

// How the table of this request is looked up; `table_kind` is what the policy reads.
// InvalidArgument: unknown value of fingerprint_match or layer_match.
absl::StatusOr<tables::TableQuery> DecodeTableQuery(const v1::OperationSpec& wire,
                                                    const engine::OperationSpec& spec,
                                                    absl::string_view table_kind);

// One layer's views.
struct DecodedLayer {
  engine::LayerObservation observation;
  // GATHER_DESTINATION: seq_len is the capacity in tokens. GATHER_IN_PLACE: K and V themselves.
  kernels::MutableKvView out_k;
  kernels::MutableKvView out_v;
  std::vector<int64_t> qo_heads;  // viewed by `observation`
};

// `block_table` is the spec's, used by paged tensors that bring none. InvalidArgument: shape,
// dtype, stride, block id, inline size. NotFound: region. FailedPrecondition: destination is
// read-only.
absl::StatusOr<DecodedLayer> DecodeLayer(const v1::LayerInput& wire,
                                         const engine::OperationSpec& spec, v1::GatherMode gather,
                                         absl::Span<const int32_t> block_table,
                                         RegionSource& regions);

// Bytes of the layer that travel inside the message and count against the inline limit.
int64_t InlineBytes(const v1::LayerInput& wire);

// Calls visit(region_id) for every region slice of the layer until it fails.
absl::Status VisitRegions(const v1::LayerInput& wire,
                          const std::function<absl::Status(const std::string&)>& visit);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_REQUEST_CODEC_H_
