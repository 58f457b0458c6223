// absl::Status -> what a client may see. Our own faults reach it as generic text with a correlation
// id; their cause stands in the log only.
#ifndef KEEPSET_SERVICE_RPC_WIRE_STATUS_H_
#define KEEPSET_SERVICE_RPC_WIRE_STATUS_H_

#include <grpcpp/support/status.h>

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace keepset::service {

// The code and message as they may leave the server; a message of more than 2 KiB is cut.
absl::Status PublicStatus(const absl::Status& status, absl::string_view correlation_id);

grpc::Status ToGrpcStatus(const absl::Status& public_status);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_WIRE_STATUS_H_
