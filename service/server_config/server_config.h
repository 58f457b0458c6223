// Configuration of keepsetd: a textproto file (proto/keepset/v1/server_config.proto), flags that
// win over it, defaults for the rest. Pure functions, thread-safe.
#ifndef KEEPSET_SERVICE_SERVER_CONFIG_SERVER_CONFIG_H_
#define KEEPSET_SERVICE_SERVER_CONFIG_SERVER_CONFIG_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "keepset/v1/server_config.pb.h"

namespace keepset::service {

// InvalidArgument lists every parse error as label:line:column. Unknown fields are errors.
absl::StatusOr<v1::ServerConfig> ParseServerConfig(absl::string_view textproto,
                                                   absl::string_view label);
// NotFound / PermissionDenied for the file, else as above.
absl::StatusOr<v1::ServerConfig> ReadServerConfig(const std::string& path);

struct CommandLine {
  enum class Action { kServe, kHelp, kVersion };
  Action action = Action::kServe;
  v1::ServerConfig
      config;  // --config with the other flags laid over it; defaults not yet filled in
};

// `arguments` without the program name. InvalidArgument starting with "usage: " for an unknown
// flag, a missing or malformed value; errors of the --config file as ReadServerConfig.
absl::StatusOr<CommandLine> ParseCommandLine(absl::Span<const char* const> arguments);
bool IsUsageError(const absl::Status& status);

// Every flag with its meaning and default.
std::string HelpText();

// Fills every default in place, then checks values: InvalidArgument names field, value and what
// would be right; TCP without TLS needs allow_insecure_tcp.
absl::Status ResolveServerConfig(v1::ServerConfig& config);

// Path of a "unix:" address, empty for others.
absl::string_view UnixPath(absl::string_view address);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_SERVER_CONFIG_SERVER_CONFIG_H_
