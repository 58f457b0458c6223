// The subcommands of `keepset registry` that change something.
#ifndef KEEPSET_CLIENTS_CLI_REGISTRY_COMMANDS_H_
#define KEEPSET_CLIENTS_CLI_REGISTRY_COMMANDS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "clients/cli/console.h"

namespace keepset::cli {

absl::Status RegistryLoad(absl::Span<const std::string> arguments, Console& console);
absl::Status RegistryActivate(absl::Span<const std::string> arguments, Console& console);
absl::Status RegistryRollback(absl::Span<const std::string> arguments, Console& console);
absl::Status RegistryCanary(absl::Span<const std::string> arguments, Console& console);
absl::Status RegistryPin(absl::Span<const std::string> arguments, Console& console);
absl::Status RegistryAlias(absl::Span<const std::string> arguments, Console& console);
absl::Status RegistryUnload(absl::Span<const std::string> arguments, Console& console);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_REGISTRY_COMMANDS_H_
