// keepset registry: load | activate | rollback | canary | pin | alias | unload.
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/registry_commands.h"
#include "clients/cli/registry_parser.h"
#include "clients/cli/registry_text.h"

namespace keepset::cli {
namespace {

using Arguments = absl::Span<const std::string>;

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream bytes;
  if (!file || !(bytes << file.rdbuf())) {
    return UsageError(absl::StrCat("file \"", path, "\" cannot be read"));
  }
  return bytes.str();
}

}  // namespace

absl::Status RegistryLoad(Arguments arguments, Console& console) {
  std::optional<std::string> digest;
  std::optional<std::string> signature;
  std::optional<std::string> actor;
  bool on_server = false;
  RegistryParser parser("load", "load FILE --server ADDR [--digest D] [--signature FILE] [--json]",
                        "Uploads a table; the server checks it completely and keeps it ready. "
                        "Nothing becomes active.");
  parser.flags()
      .Text("--digest", "D", "refuse unless the file has this digest (sha256:HEX)", &digest)
      .Text("--signature", "FILE", "its detached signature", &signature)
      .Switch("--on-server", "FILE is a path inside the server's tables directory", &on_server)
      .Text("--actor", "WHO", "who asks, for the server's audit log", &actor);
  KEEPSET_ASSIGN_OR_RETURN(const bool go_on, parser.Parse(arguments, 1, 1, console));
  if (!go_on) return absl::OkStatus();
  client::TableUpload upload;
  upload.expected_digest = digest.value_or("");
  upload.actor = actor.value_or("");
  if (signature.has_value()) {
    KEEPSET_ASSIGN_OR_RETURN(upload.signature, ReadFile(*signature));
  }
  absl::StatusOr<client::TableUploadResult> result;
  if (on_server) {
    result = parser.client().LoadPath(parser.positional(0), upload);
  } else {
    KEEPSET_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(parser.positional(0)));
    result = parser.client().Load(bytes, upload);
  }
  KEEPSET_RETURN_IF_ERROR(result.status());
  if (parser.json()) {
    console.out << JsonText({{"revision", result->revision},
                             {"durable", result->durable},
                             {"already_loaded", result->already_loaded},
                             {"version", VersionJson(result->version)}})
                << "\n";
    return absl::OkStatus();
  }
  console.out << result->version.name << "@" << result->version.version << "  "
              << client::TableStateName(result->version.state) << "  " << result->version.digest
              << (result->already_loaded ? "  (was loaded already)" : "") << "\n";
  if (!result->durable) console.err << "note: kept in memory, a restarted server forgets it\n";
  return absl::OkStatus();
}

absl::Status RegistryActivate(Arguments arguments, Console& console) {
  std::optional<std::string> alias;
  RegistryParser parser("activate", "activate NAME@VERSION --server ADDR [--alias A] [--json]",
                        "Unpinned requests get this version from now on; running ones end with "
                        "theirs.");
  parser.AddWriteFlags();
  parser.flags().Text("--alias", "A", "this alias names the version too, in the same change",
                      &alias);
  KEEPSET_ASSIGN_OR_RETURN(const bool go_on, parser.Parse(arguments, 1, 1, console));
  if (!go_on) return absl::OkStatus();
  KEEPSET_ASSIGN_OR_RETURN(const client::TableRef ref, ParseTableVersion(parser.positional(0)));
  return ReportWrite(parser.client().Activate(ref, alias.value_or(""), parser.write()), parser,
                     console);
}

absl::Status RegistryRollback(Arguments arguments, Console& console) {
  RegistryParser parser("rollback", "rollback NAME --server ADDR [--json]",
                        "Back to the version that was active before; again: the one before it.");
  parser.AddWriteFlags();
  KEEPSET_ASSIGN_OR_RETURN(const bool go_on, parser.Parse(arguments, 1, 1, console));
  if (!go_on) return absl::OkStatus();
  KEEPSET_ASSIGN_OR_RETURN(const std::string name, ParseTableName(parser.positional(0)));
  return ReportWrite(parser.client().Rollback(name, parser.write()), parser, console);
}

absl::Status RegistryCanary(Arguments arguments, Console& console) {
  std::optional<double> percent;
  std::optional<std::string> salt;
  bool end = false;
  RegistryParser parser(
      "canary", "canary NAME@VERSION --percent P --server ADDR | canary NAME --end ...",
      "A share of the unpinned requests gets this version; a request id keeps its side.");
  parser.AddWriteFlags();
  parser.flags()
      .Real("--percent", "P", "share of the requests, 0.01..100", &percent)
      .Text("--salt", "S", "another salt draws other requests (default: the digest)", &salt)
      .Switch("--end", "no canary any more", &end);
  KEEPSET_ASSIGN_OR_RETURN(const bool go_on, parser.Parse(arguments, 1, 1, console));
  if (!go_on) return absl::OkStatus();
  if (end == percent.has_value()) {
    return UsageError("canary: want one of --percent P and --end");
  }
  client::TableRef ref;
  if (end) {
    KEEPSET_ASSIGN_OR_RETURN(ref, ParseTableRef(parser.positional(0)));
  } else {
    if (!(*percent >= 0.01 && *percent <= 100.0)) {
      return UsageError(absl::StrCat("--percent=", *percent, ", want 0.01..100"));
    }
    KEEPSET_ASSIGN_OR_RETURN(ref, ParseTableVersion(parser.positional(0)));
  }
  return ReportWrite(
      parser.client().SetCanary(ref, percent.value_or(0.0), salt.value_or(""), parser.write()),
      parser, console);
}

absl::Status RegistryPin(Arguments arguments, Console& console) {
  bool release = false;
  RegistryParser parser("pin", "pin NAME[@VERSION] --server ADDR | pin NAME --release ...",
                        "The line stays on its active version (or VERSION), whatever newer files "
                        "appear. One request\nis pinned by the request itself: keepset compress "
                        "--table-version.");
  parser.AddWriteFlags();
  parser.flags().Switch("--release", "the newest version of the watched directory is active again",
                        &release);
  KEEPSET_ASSIGN_OR_RETURN(const bool go_on, parser.Parse(arguments, 1, 1, console));
  if (!go_on) return absl::OkStatus();
  if (release) {
    KEEPSET_ASSIGN_OR_RETURN(const std::string name, ParseTableName(parser.positional(0)));
    return ReportWrite(parser.client().FollowNewest(name, parser.write()), parser, console);
  }
  KEEPSET_ASSIGN_OR_RETURN(client::TableRef ref, ParseTableRef(parser.positional(0)));
  if (ref.version.empty() && ref.digest.empty() && ref.alias.empty()) ref.alias = "stable";
  return ReportWrite(parser.client().Activate(ref, "", parser.write()), parser, console);
}

absl::Status RegistryAlias(Arguments arguments, Console& console) {
  bool remove = false;
  RegistryParser parser("alias",
                        "alias NAME@VERSION ALIAS --server ADDR | alias NAME ALIAS --remove",
                        "A name of your own for a version, for requests that pin it.");
  parser.AddWriteFlags();
  parser.flags().Switch("--remove", "the alias is gone", &remove);
  KEEPSET_ASSIGN_OR_RETURN(const bool go_on, parser.Parse(arguments, 2, 2, console));
  if (!go_on) return absl::OkStatus();
  if (remove) {
    KEEPSET_ASSIGN_OR_RETURN(const std::string name, ParseTableName(parser.positional(0)));
    return ReportWrite(parser.client().SetAlias(name, parser.positional(1), {}, parser.write()),
                       parser, console);
  }
  KEEPSET_ASSIGN_OR_RETURN(const client::TableRef ref, ParseTableVersion(parser.positional(0)));
  return ReportWrite(parser.client().SetAlias(ref.name, parser.positional(1), ref, parser.write()),
                     parser, console);
}

absl::Status RegistryUnload(Arguments arguments, Console& console) {
  RegistryParser parser("unload", "unload NAME@VERSION --server ADDR [--json]",
                        "Forgets an uploaded version; refused while it is active, canary or has "
                        "an alias.");
  parser.AddWriteFlags();
  KEEPSET_ASSIGN_OR_RETURN(const bool go_on, parser.Parse(arguments, 1, 1, console));
  if (!go_on) return absl::OkStatus();
  KEEPSET_ASSIGN_OR_RETURN(const client::TableRef ref, ParseTableVersion(parser.positional(0)));
  return ReportWrite(parser.client().Unload(ref, parser.write()), parser, console);
}

}  // namespace keepset::cli
