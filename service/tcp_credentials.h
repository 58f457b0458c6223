// Credentials of listeners that are TCP ports.
#ifndef KEEPSET_SERVICE_TCP_CREDENTIALS_H_
#define KEEPSET_SERVICE_TCP_CREDENTIALS_H_

#include <grpcpp/security/server_credentials.h>

#include <memory>

#include "absl/status/statusor.h"
#include "keepset/v1/server_config.pb.h"

namespace keepset::service {

// Without a certificate: plain text. With client_ca_file: clients must show a certificate that it
// signed. InvalidArgument: a file cannot be read, named with its field.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> TcpCredentials(
    const v1::ServerConfig::Tls& tls);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_TCP_CREDENTIALS_H_
