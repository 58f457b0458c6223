#include "clients/cli/server_connection.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "clients/cli/exit_status.h"

namespace keepset::cli {

absl::Status ServerFlags::Check() const {
  const std::pair<const char*, bool> tls_flags[] = {
      {"--tls", tls},
      {"--tls-ca", tls_ca.has_value()},
      {"--tls-cert", tls_certificate.has_value()},
      {"--tls-key", tls_key.has_value()},
      {"--tls-server-name", tls_server_name.has_value()},
  };
  for (const auto& [flag, given] : tls_flags) {
    if (!given) continue;
    if (!address.has_value()) return UsageError(absl::StrCat(flag, " needs --server"));
    if (!tls && !tls_ca.has_value()) {
      return UsageError(absl::StrCat(flag, " needs --tls (the system's certificates) or --tls-ca"));
    }
  }
  return absl::OkStatus();
}

client::ClientOptions ServerFlags::Options() const {
  client::ClientOptions options;
  options.address = address.value_or("");
  if (tls || tls_ca.has_value()) {
    options.tls = {tls_ca.value_or(""), tls_certificate.value_or(""), tls_key.value_or(""),
                   tls_server_name.value_or("")};
  }
  return options;
}

FlagParser& AddServerFlags(FlagParser& parser, ServerFlags* flags) {
  return parser.Text("--server", "ADDR", "unix:/path/to.sock or host:port", &flags->address)
      .Switch("--tls", "with host:port: TLS, trusting the system's certificates", &flags->tls)
      .Text("--tls-ca", "FILE", "TLS, trusting this PEM file", &flags->tls_ca)
      .Text("--tls-cert", "FILE", "client certificate, PEM", &flags->tls_certificate)
      .Text("--tls-key", "FILE", "its key, PEM", &flags->tls_key)
      .Text("--tls-server-name", "NAME", "name expected in the server's certificate",
            &flags->tls_server_name);
}

absl::StatusOr<std::unique_ptr<client::Client>> ConnectToServer(
    const client::ClientOptions& options) {
  absl::StatusOr<std::unique_ptr<client::Client>> client = client::Client::Connect(options);
  if (client.ok()) return client;
  const absl::Status& status = client.status();
  if (absl::IsInvalidArgument(status)) return WithExitCode(status, ExitCode::kUsage);
  if (absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status)) {
    return WithExitCode(
        absl::UnavailableError(absl::StrCat("no keepsetd answers at ", options.address, " (",
                                            status.message(), "); is it running?")),
        ExitCode::kUnreachable);
  }
  return WithPrefix(options.address, status);
}

}  // namespace keepset::cli
