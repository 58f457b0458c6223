// How much device memory an operation takes, before it begins.
#ifndef KEEPSET_ENGINE_DEVICE_BYTES_H_
#define KEEPSET_ENGINE_DEVICE_BYTES_H_

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "engine/operation_types.h"
#include "engine/policies/policy_registry.h"
#include "kernels/compute_backend.h"

namespace keepset::engine {

// What is done with the rows that an operation keeps.
enum class KeptRows {
  kStay,     // nothing: positions are all that is wanted
  kGather,   // GatherLayers of all layers
  kInPlace,  // ReserveInPlace and GatherInPlace of all layers
};

struct DeviceBytesOptions {
  // What every layer brings, in device memory and with all heads; K or V that it lacks and that are
  // gathered have the layout below. Absent: queries of kv_dtype, K and V in pages of 16 tokens, and
  // no log-sum-exp. Pointers are compared, and no byte behind them is looked at; block tables are.
  std::optional<LayerObservation> layer;
  KeptRows kept_rows = KeptRows::kGather;  // into tensors of the layout they come from
};

// Bytes of device memory of a fixed size, a multiple of 256, in which an operation of `spec` runs
// alone when its layers are handed over together (ObserveLayers). It goes through the operation
// with a backend that only counts (ComputeBackend::NewMeasure): the device does nothing.
// device_stream, on_short_memory and deadline are not looked at. Scores, and what is observed, need
// exactly so much; less serves where fewer positions are kept than may be, and where a gather goes
// in more steps. 0: the backend takes no device memory. Errors: those of the operation.
absl::StatusOr<int64_t> DeviceBytes(OperationSpec spec, const DeviceBytesOptions& options,
                                    const PolicyRegistry& policies,
                                    const kernels::ComputeBackend& backend);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_DEVICE_BYTES_H_
