#include "clients/cli/server_connection.h"

#include "absl/strings/str_cat.h"
#include "clients/cli/exit_status.h"

namespace keepset::cli {

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
