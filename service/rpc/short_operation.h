// Operations that take less time than handing them to a worker and waking it would.
#ifndef KEEPSET_SERVICE_RPC_SHORT_OPERATION_H_
#define KEEPSET_SERVICE_RPC_SHORT_OPERATION_H_

#include "keepset/v1/compression.pb.h"
#include "kernels/compute_backend.h"

namespace keepset::service {

// Whether the thread that received an operation may run it, when the queue has a seat for it: by
// its size, all layers together, and because it waits for no device (`device` is the backend's) and
// does no second table's work.
bool IsShort(const v1::OperationSpec& spec, const kernels::DeviceInfo& device);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_SHORT_OPERATION_H_
