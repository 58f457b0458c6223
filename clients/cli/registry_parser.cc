#include "clients/cli/registry_parser.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/registry_text.h"

namespace keepset::cli {

RegistryParser::RegistryParser(const char* command, const char* synopsis, const char* summary)
    : parser_(absl::StrCat("registry ", command), absl::StrCat("registry ", synopsis), summary) {
  AddServerFlags(parser_, &server_);
  parser_.Switch("--json", "JSON instead of text", &json_);
}

void RegistryParser::AddWriteFlags() {
  parser_.Text("--actor", "WHO", "who asks, for the server's audit log", &actor_)
      .Int("--expected-revision", "N", "refuse unless the line's revision is N", &revision_);
}

absl::StatusOr<bool> RegistryParser::Parse(absl::Span<const std::string> arguments,
                                           int min_positionals, int max_positionals,
                                           Console& console) {
  if (FlagParser::HelpAsked(arguments)) {
    console.out << parser_.Help();
    return false;
  }
  KEEPSET_ASSIGN_OR_RETURN(positionals_,
                           parser_.Parse(arguments, min_positionals, max_positionals));
  KEEPSET_RETURN_IF_ERROR(server_.Check());
  if (!server_.address.has_value()) {
    return UsageError("--server is missing, want unix:/path/to.sock or host:port");
  }
  if (revision_.value_or(1) < 1) {
    return UsageError(absl::StrCat("--expected-revision=", *revision_, ", want 1 or more"));
  }
  absl::StatusOr<std::unique_ptr<client::TableClient>> client =
      client::TableClient::New(server_.Options());
  if (!client.ok()) return WithExitCode(client.status(), ExitCode::kUsage);
  client_ = *std::move(client);
  return true;
}

absl::StatusOr<client::TableRef> ParseTableVersion(const std::string& text) {
  KEEPSET_ASSIGN_OR_RETURN(client::TableRef ref, ParseTableRef(text));
  if (ref.version.empty() && ref.digest.empty() && ref.alias.empty()) {
    return UsageError(absl::StrCat("table \"", text,
                                   "\", want a version: NAME@VERSION, NAME@sha256:HEX or "
                                   "NAME:ALIAS (keepset registry list shows them)"));
  }
  return ref;
}

absl::StatusOr<std::string> ParseTableName(const std::string& text) {
  KEEPSET_ASSIGN_OR_RETURN(const client::TableRef ref, ParseTableRef(text));
  if (ref.name != text) return UsageError(absl::StrCat("table \"", text, "\", want NAME alone"));
  return ref.name;
}

absl::Status ReportWrite(const absl::StatusOr<client::TableWriteResult>& result,
                         const RegistryParser& parser, Console& console) {
  KEEPSET_RETURN_IF_ERROR(result.status());
  if (parser.json()) {
    console.out << JsonText({{"revision", result->revision},
                             {"previous_version", result->previous_version},
                             {"durable", result->durable},
                             {"line", LineJson(result->line)}})
                << "\n";
    return absl::OkStatus();
  }
  console.out << LineText(result->line);
  if (!result->previous_version.empty() &&
      result->previous_version != result->line.active_version) {
    console.out << "  (was " << result->previous_version << ")";
  }
  console.out << "\n";
  if (!result->durable) console.err << "note: kept in memory, a restarted server forgets it\n";
  return absl::OkStatus();
}

}  // namespace keepset::cli
