#include "clients/cli/command_list.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/flag_parser.h"
#include "engine/keepset.h"

namespace keepset::cli {
namespace {

std::string Overview() {
  std::string out =
      "usage: keepset COMMAND [ARGUMENTS]\n\n"
      "KV-cache retention at the end of prefill: which positions to keep, per layer.\n\n";
  for (const Command& command : Commands()) {
    absl::StrAppendFormat(&out, "  %-10s %s\n", command.name, command.summary);
  }
  absl::StrAppend(&out,
                  "\nkeepset COMMAND --help describes a command, keepset --version the program.\n"
                  "Exit codes: 0 done, 2 usage, 3 refused input, 4 server unreachable or shutting "
                  "down, 5 failed.\n");
  return out;
}

absl::Status Dispatch(absl::Span<const std::string> arguments, Console& console) {
  if (arguments.empty()) {
    return UsageError("no command, want keepset COMMAND (keepset --help lists them)");
  }
  const std::string& name = arguments[0];
  if (name == "--help" || name == "-h" || name == "help") {
    console.out << Overview();
    return absl::OkStatus();
  }
  if (name == "--version") {
    console.out << "keepset " << keepset_version() << "\n";
    return absl::OkStatus();
  }
  std::vector<std::string> names;
  for (const Command& command : Commands()) {
    if (command.name == name) return command.run(arguments.subspan(1), console);
    names.emplace_back(command.name);
  }
  const std::string nearest = NearestName(name, names);
  return UsageError(
      absl::StrCat("unknown command \"", name, "\"",
                   nearest.empty() ? "" : absl::StrCat(", did you mean ", nearest, "?"),
                   " (keepset --help lists them)"));
}

}  // namespace

std::vector<Command> Commands() {
  return {
      {"compress", "the keep set of a captured prompt, in process or by a server", RunCompress},
      {"tables", "inspect, validate, compare, compile, import or make decision tables", RunTables},
      {"health", "whether a server is live, or ready for work", RunHealth},
      {"info", "what a server is and which tables it serves", RunInfo},
      {"registry", "list, load, activate, roll back and watch a server's tables", RunRegistry},
      {"bench", "speed of the engine, or what the service adds to it", RunBench},
  };
}

int RunKeepset(absl::Span<const std::string> arguments, Console& console) {
  for (const std::string& argument : arguments) {
    if (argument == "--") break;
    // Known before parsing, so that a parse error is printed as JSON too.
    if (argument == "--json") console.format = OutputFormat::kJson;
  }
  absl::Status status = Dispatch(arguments, console);
  console.out.flush();
  if (status.ok() && !console.out.good()) {
    status =
        WithExitCode(absl::DataLossError("standard output cannot be written"), ExitCode::kFailed);
  }
  if (!status.ok()) PrintError(status, console);
  return static_cast<int>(ExitCodeOf(status));
}

}  // namespace keepset::cli
