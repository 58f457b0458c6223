// gRPC statuses as absl statuses; the codes are the same numbers.
#ifndef KEEPSET_CLIENTS_CPP_RPC_STATUS_H_
#define KEEPSET_CLIENTS_CPP_RPC_STATUS_H_

#include <grpcpp/grpcpp.h>

#include "absl/status/status.h"

namespace keepset::client {

inline absl::Status FromRpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_RPC_STATUS_H_
