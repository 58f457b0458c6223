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

// How a caller hands over layers, observed ones and such whose rows move.
enum class Handover {
  kTogether,  // all of them with one call
  kOneByOne,  // takes less, and more time
};

// What is done with the rows that an operation keeps.
enum class RowMove {
  kNone,     // positions are all that is wanted
  kGather,   // GatherLayers
  kInPlace,  // GatherInPlace, of layers together after ReserveInPlace
};

struct DeviceBytesOptions {
  // What every layer brings, in device memory and with all heads; K or V that it lacks and that are
  // gathered have the layout below. Absent: queries of kv_dtype, K and V in pages of 16 tokens, and
  // no log-sum-exp. Pointers are compared, and no byte behind them is looked at; block tables are.
  std::optional<LayerObservation> layer;
  Handover handover = Handover::kTogether;
  RowMove row_move = RowMove::kGather;  // into tensors of the layout they come from
};

// Bytes of device memory of a fixed size, a multiple of 256, in which an operation of `spec` runs
// alone. It goes through the operation with a backend that only counts
// (ComputeBackend::NewMeasure): the device does nothing. device_stream, on_short_memory and
// deadline are not looked at. One piece of 256 bytes less does not serve the same calls, where as
// many positions are kept as may be; layers that are handed over together are then taken one by
// one, as far as that helps, and rows move in more steps. 0: the backend takes no device memory.
// Errors: those of the operation.
absl::StatusOr<int64_t> DeviceBytes(OperationSpec spec, const DeviceBytesOptions& options,
                                    const PolicyRegistry& policies,
                                    const kernels::ComputeBackend& backend);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_DEVICE_BYTES_H_
