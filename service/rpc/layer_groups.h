// Which layers of a model an operation is about, and how those attend that it is not.
#ifndef KEEPSET_SERVICE_RPC_LAYER_GROUPS_H_
#define KEEPSET_SERVICE_RPC_LAYER_GROUPS_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "keepset/v1/compression.pb.h"

namespace keepset::service {

// The layers that `wire.layer_groups` leaves out, ascending. InvalidArgument: a layer in no group
// or in two, a window where there is none, or another number of layers than model.num_layers takes
// part. FailedPrecondition: a group that takes part without full attention.
absl::StatusOr<std::vector<uint32_t>> LayersLeftOut(const v1::OperationSpec& wire);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_LAYER_GROUPS_H_
