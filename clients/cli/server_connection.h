// Connecting to keepsetd, with failures as exit codes.
#ifndef KEEPSET_CLIENTS_CLI_SERVER_CONNECTION_H_
#define KEEPSET_CLIENTS_CLI_SERVER_CONNECTION_H_

#include <memory>

#include "absl/status/statusor.h"
#include "clients/cpp/client.h"

namespace keepset::cli {

// Usage error: an address of another form. Unreachable: nobody answers, or not in time.
absl::StatusOr<std::unique_ptr<client::Client>> ConnectToServer(
    const client::ClientOptions& options);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_SERVER_CONNECTION_H_
