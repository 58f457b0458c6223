// Connecting to keepsetd, with failures as exit codes.
#ifndef KEEPSET_CLIENTS_CLI_SERVER_CONNECTION_H_
#define KEEPSET_CLIENTS_CLI_SERVER_CONNECTION_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/cli/flag_parser.h"
#include "clients/cpp/client.h"

namespace keepset::cli {

// The flags of every command that talks to a server.
struct ServerFlags {
  std::optional<std::string> address;
  std::optional<std::string> tls_ca;
  std::optional<std::string> tls_certificate;
  std::optional<std::string> tls_key;
  std::optional<std::string> tls_server_name;
  bool tls = false;

  // Usage error: a flag of TLS without --tls or --tls-ca, or without --server.
  absl::Status Check() const;
  // Checked flags, with an address.
  client::ClientOptions Options() const;
};

// Declares --server and the flags of TLS; `flags` must outlive Parse.
FlagParser& AddServerFlags(FlagParser& parser, ServerFlags* flags);

// Usage error: an address of another form. Unreachable: nobody answers, or not in time.
absl::StatusOr<std::unique_ptr<client::Client>> ConnectToServer(
    const client::ClientOptions& options);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_SERVER_CONNECTION_H_
