// What the subcommands of `keepset registry` share: flags, connection, table names, report of a
// write.
#ifndef KEEPSET_CLIENTS_CLI_REGISTRY_PARSER_H_
#define KEEPSET_CLIENTS_CLI_REGISTRY_PARSER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "clients/cli/console.h"
#include "clients/cli/flag_parser.h"
#include "clients/cli/server_connection.h"
#include "clients/cpp/table_client.h"

namespace keepset::cli {

// The flags of one subcommand: --server and TLS, --json, and what it adds through flags().
class RegistryParser {
 public:
  RegistryParser(const char* command, const char* synopsis, const char* summary);

  FlagParser& flags() { return parser_; }

  // --actor and --expected-revision.
  void AddWriteFlags();

  // False after --help was printed.
  absl::StatusOr<bool> Parse(absl::Span<const std::string> arguments, int min_positionals,
                             int max_positionals, Console& console);

  const std::string& positional(size_t index) const { return positionals_[index]; }
  size_t num_positionals() const { return positionals_.size(); }
  client::TableClient& client() const { return *client_; }
  client::TableWrite write() const {
    return {actor_.value_or(""), static_cast<uint64_t>(revision_.value_or(0))};
  }
  bool json() const { return json_; }

 private:
  FlagParser parser_;
  ServerFlags server_;
  bool json_ = false;
  std::optional<std::string> actor_;
  std::optional<int64_t> revision_;
  std::vector<std::string> positionals_;
  std::unique_ptr<client::TableClient> client_;
};

// A table named with a version, digest or alias; usage error without one.
absl::StatusOr<client::TableRef> ParseTableVersion(const std::string& text);
// Usage error: more than a name.
absl::StatusOr<std::string> ParseTableName(const std::string& text);

// The line after a write, or the document of --json; says on stderr when it will not survive a
// restart.
absl::Status ReportWrite(const absl::StatusOr<client::TableWriteResult>& result,
                         const RegistryParser& parser, Console& console);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_REGISTRY_PARSER_H_
