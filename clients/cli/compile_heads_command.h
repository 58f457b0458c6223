// The form of `keepset tables compile` that makes observation_heads tables.
#ifndef KEEPSET_CLIENTS_CLI_COMPILE_HEADS_COMMAND_H_
#define KEEPSET_CLIENTS_CLI_COMPILE_HEADS_COMMAND_H_

#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "clients/cli/console.h"

namespace keepset::cli {

// Whether the arguments of `tables compile` name this kind.
bool AsksForHeads(absl::Span<const std::string> arguments);

absl::Status RunCompileHeads(absl::Span<const std::string> arguments, Console& console);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_COMPILE_HEADS_COMMAND_H_
