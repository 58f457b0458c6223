// The gRPC channel of a client.
#ifndef KEEPSET_CLIENTS_CPP_CHANNEL_H_
#define KEEPSET_CLIENTS_CPP_CHANNEL_H_

#include <grpcpp/channel.h>

#include <memory>

#include "absl/status/statusor.h"
#include "clients/cpp/client.h"

namespace keepset::client {

// Lazily connected. InvalidArgument: an address of another form, TLS over a Unix socket, a client
// certificate without its key, or a PEM file that cannot be read.
absl::StatusOr<std::shared_ptr<grpc::Channel>> NewChannel(const ClientOptions& options);

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_CHANNEL_H_
