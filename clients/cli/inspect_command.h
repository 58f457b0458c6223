// keepset tables inspect | diff: a table for people, alone and beside another.
#ifndef KEEPSET_CLIENTS_CLI_INSPECT_COMMAND_H_
#define KEEPSET_CLIENTS_CLI_INSPECT_COMMAND_H_

#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "clients/cli/console.h"

namespace keepset::cli {

absl::Status RunTablesInspect(absl::Span<const std::string> arguments, Console& console);
absl::Status RunTablesDiff(absl::Span<const std::string> arguments, Console& console);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_INSPECT_COMMAND_H_
