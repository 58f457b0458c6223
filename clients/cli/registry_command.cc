// keepset registry: the subcommands that read, and the way to the others.
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "clients/cli/command_list.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/registry_commands.h"
#include "clients/cli/registry_parser.h"
#include "clients/cli/registry_text.h"
#include "clients/cli/table_text.h"

namespace keepset::cli {
namespace {

using Arguments = absl::Span<const std::string>;
using Json = nlohmann::ordered_json;

absl::Status List(Arguments arguments, Console& console) {
  std::optional<std::string> model;
  RegistryParser parser("list", "list [NAME] --server ADDR [--model ARCHITECTURE] [--json]",
                        "Every table version a server knows, its state and its role.");
  parser.flags().Text("--model", "ARCHITECTURE", "only tables of this model", &model);
  KEEPSET_ASSIGN_OR_RETURN(const bool go_on, parser.Parse(arguments, 0, 1, console));
  if (!go_on) return absl::OkStatus();
  const std::string name = parser.num_positionals() == 1 ? parser.positional(0) : "";
  KEEPSET_ASSIGN_OR_RETURN(const client::TableList list,
                           parser.client().List(name, model.value_or("")));
  console.out << (parser.json() ? JsonText(RegistryJson(list)) + "\n" : RegistryText(list));
  return absl::OkStatus();
}

absl::Status Show(Arguments arguments, Console& console) {
  RegistryParser parser("show", "show NAME[@VERSION] --server ADDR [--json]",
                        "What one loaded table says; without a version the active one.");
  KEEPSET_ASSIGN_OR_RETURN(const bool go_on, parser.Parse(arguments, 1, 1, console));
  if (!go_on) return absl::OkStatus();
  KEEPSET_ASSIGN_OR_RETURN(client::TableRef ref, ParseTableRef(parser.positional(0)));
  if (ref.version.empty() && ref.digest.empty() && ref.alias.empty()) ref.alias = "stable";
  KEEPSET_ASSIGN_OR_RETURN(const client::TableDetails details, parser.client().Get(ref));
  if (parser.json()) {
    console.out << JsonText({{"version", VersionJson(details.version)},
                             {"revision", details.revision},
                             {"inspect", Json::parse(details.inspect_json, nullptr, false)}})
                << "\n";
  } else {
    console.out << TableText(details.version.origin, details.inspect_json);
  }
  return absl::OkStatus();
}

void PrintChange(const client::TableChange& change, const RegistryParser& parser,
                 Console& console) {
  if (parser.json()) {
    console.out << JsonText(ChangeJson(change)) << "\n";
  } else {
    for (const client::TableLine& line : change.lines) console.out << LineText(line) << "\n";
    for (const std::string& name : change.removed) {
      console.out << name << "  revision " << change.revision << "  gone\n";
    }
    for (const client::TableSource& source : change.sources) {
      if (!source.healthy)
        console.out << "source " << source.source << ": " << source.detail << "\n";
    }
  }
  console.out.flush();
}

absl::Status Watch(Arguments arguments, Console& console) {
  std::optional<std::string> until_active;
  std::optional<int64_t> timeout_ms;
  RegistryParser parser("watch",
                        "watch [NAME] --server ADDR [--until-active NAME@VERSION] [--timeout-ms N]",
                        "The state now, then every change as it happens; with --json one document "
                        "a line. Exit code 5\nwhen the time is over before the version is active.");
  parser.flags()
      .Text("--until-active", "NAME@VERSION", "end with exit code 0 when this version is active",
            &until_active)
      .Int("--timeout-ms", "N", "give up after N milliseconds", &timeout_ms);
  KEEPSET_ASSIGN_OR_RETURN(const bool go_on, parser.Parse(arguments, 0, 1, console));
  if (!go_on) return absl::OkStatus();
  if (timeout_ms.value_or(1) < 1) {
    return UsageError(absl::StrCat("--timeout-ms=", *timeout_ms, ", want 1 or more"));
  }
  std::optional<client::TableRef> until;
  if (until_active.has_value()) {
    KEEPSET_ASSIGN_OR_RETURN(until, ParseTableVersion(*until_active));
  }
  const absl::Time deadline = timeout_ms.has_value() ? absl::Now() + absl::Milliseconds(*timeout_ms)
                                                     : absl::InfiniteFuture();
  const std::string name = parser.num_positionals() == 1 ? parser.positional(0) : "";
  absl::Status status =
      parser.client().Watch(name, until, deadline, [&](const client::TableChange& change) {
        PrintChange(change, parser, console);
        return console.out.good() ? client::TableClient::Next::kContinue
                                  : client::TableClient::Next::kStop;
      });
  if (!absl::IsDeadlineExceeded(status) || !timeout_ms.has_value()) return status;
  // Without a version to wait for, the time given is the time watched.
  if (!until_active.has_value()) return absl::OkStatus();
  return absl::DeadlineExceededError(
      absl::StrCat(*until_active, " was not active within ", *timeout_ms, " ms"));
}

struct RegistryCommand {
  const char* name;
  const char* summary;
  absl::Status (*run)(Arguments arguments, Console& console);
};

constexpr RegistryCommand kRegistryCommands[] = {
    {"list", "every table version, its state and role", List},
    {"show", "what one loaded table says", Show},
    {"load", "upload a table; nothing becomes active", RegistryLoad},
    {"activate", "a version for all unpinned requests", RegistryActivate},
    {"rollback", "back to the version before", RegistryRollback},
    {"canary", "a version for a share of the requests", RegistryCanary},
    {"pin", "hold a line on its version, or let it follow the newest", RegistryPin},
    {"alias", "a name for a version", RegistryAlias},
    {"unload", "forget an uploaded version", RegistryUnload},
    {"watch", "the state and every change; wait for a version", Watch},
};

}  // namespace

absl::Status RunRegistry(absl::Span<const std::string> arguments, Console& console) {
  std::vector<std::string> names;
  for (const RegistryCommand& command : kRegistryCommands) {
    if (!arguments.empty() && arguments[0] == command.name) {
      return command.run(arguments.subspan(1), console);
    }
    names.emplace_back(command.name);
  }
  if (FlagParser::HelpAsked(arguments)) {
    console.out << "usage: keepset registry COMMAND --server ADDR ...\n\n";
    for (const RegistryCommand& command : kRegistryCommands) {
      console.out << absl::StrFormat("  %-10s %s\n", command.name, command.summary);
    }
    return absl::OkStatus();
  }
  if (arguments.empty()) {
    return UsageError("registry: no command (keepset registry --help lists them)");
  }
  const std::string nearest = NearestName(arguments[0], names);
  return UsageError(
      absl::StrCat("unknown command \"registry ", arguments[0], "\"",
                   nearest.empty() ? "" : absl::StrCat(", did you mean ", nearest, "?"),
                   " (keepset registry --help lists them)"));
}

}  // namespace keepset::cli
