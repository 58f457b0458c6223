// Every command of `keepset`; a new one is a file of its own and a line in command_list.cc.
#ifndef KEEPSET_CLIENTS_CLI_COMMAND_LIST_H_
#define KEEPSET_CLIENTS_CLI_COMMAND_LIST_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "clients/cli/console.h"

namespace keepset::cli {

struct Command {
  absl::string_view name;
  absl::string_view summary;
  // `arguments` follow the command's name.
  absl::Status (*run)(absl::Span<const std::string> arguments, Console& console);
};

std::vector<Command> Commands();

// Runs what `arguments` (without the program's name) ask for and answers the exit code of
// formats.md; a failure is one line on console.err.
int RunKeepset(absl::Span<const std::string> arguments, Console& console);

absl::Status RunCompress(absl::Span<const std::string> arguments, Console& console);
absl::Status RunTables(absl::Span<const std::string> arguments, Console& console);
absl::Status RunBench(absl::Span<const std::string> arguments, Console& console);
absl::Status RunHealth(absl::Span<const std::string> arguments, Console& console);
absl::Status RunInfo(absl::Span<const std::string> arguments, Console& console);
absl::Status RunRegistry(absl::Span<const std::string> arguments, Console& console);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_COMMAND_LIST_H_
