// keepset bench: engine | service.
#include "clients/cli/bench_command.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "clients/cli/command_list.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/flag_parser.h"

namespace keepset::cli {

absl::Status RunBench(absl::Span<const std::string> arguments, Console& console) {
  const std::string name = arguments.empty() ? "" : arguments[0];
  if (name == "engine") return RunBenchEngine(arguments.subspan(1), console);
  if (name == "service") return RunBenchService(arguments.subspan(1), console);
  if (FlagParser::HelpAsked(arguments)) {
    console.out
        << "usage: keepset bench COMMAND ...\n\n"
           "  engine     seconds per prompt of the 8B shape, against the multiply-add peak\n"
           "  service    what a server adds to the work in process\n";
    return absl::OkStatus();
  }
  return UsageError(name.empty() ? "bench: no command, want bench engine or bench service"
                                 : absl::StrCat("unknown command \"bench ", name,
                                                "\", want bench engine or bench service"));
}

}  // namespace keepset::cli
