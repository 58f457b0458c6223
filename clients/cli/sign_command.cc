// keepset tables sign.
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "clients/cli/engine_handles.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/flag_parser.h"
#include "clients/cli/new_table.h"
#include "engine/keepset.h"

namespace keepset::cli {

absl::Status RunTablesSign(absl::Span<const std::string> arguments, Console& console) {
  constexpr int kManyFiles = 1 << 20;
  std::optional<std::string> key;
  bool json = false;
  FlagParser parser("tables sign", "tables sign --key KEY.pem FILE... [--json]",
                    "Signs table files: FILE.sig beside each holds an Ed25519 signature of its "
                    "bytes. A key is made by openssl genpkey -algorithm ed25519.");
  parser.Text("--key", "FILE", "private key, PEM, not encrypted", &key)
      .Switch("--json", "one JSON object per file", &json);
  if (FlagParser::HelpAsked(arguments)) {
    console.out << parser.Help();
    return absl::OkStatus();
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<std::string> files,
                           parser.Parse(arguments, 1, kManyFiles));
  if (!key.has_value()) return UsageError("tables sign: --key is missing");
  KEEPSET_RETURN_IF_ERROR(CheckFileExists("key", *key));
  for (const std::string& file : files) {
    KEEPSET_RETURN_IF_ERROR(CheckFileExists("table", file));
    const std::string signature = absl::StrCat(file, ".sig");
    KEEPSET_RETURN_IF_ERROR(CheckOutput("signature", signature, {{"key", *key}, {"table", file}}));
    KEEPSET_RETURN_IF_ERROR(
        WriteStatus(FromEngine(keepset_table_sign(file.c_str(), key->c_str()))));
    if (json) {
      const nlohmann::ordered_json line = {{"file", file}, {"signature", signature}};
      console.out << line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace)
                  << "\n";
    } else if (console.wants_summary()) {
      console.out << signature << "\n";
    }
  }
  return absl::OkStatus();
}

}  // namespace keepset::cli
