// Command-line flags of one command: `--name value`, `--name=value`, switches, repeated flags.
// Everything that is not declared is refused with the nearest known name.
#ifndef KEEPSET_CLIENTS_CLI_FLAG_PARSER_H_
#define KEEPSET_CLIENTS_CLI_FLAG_PARSER_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace keepset::cli {

// Destinations must outlive Parse.
class FlagParser {
 public:
  // `synopsis` follows "usage: keepset ".
  FlagParser(std::string command, std::string synopsis, std::string summary);

  FlagParser& Text(absl::string_view name, absl::string_view placeholder, absl::string_view help,
                   std::optional<std::string>* out);
  FlagParser& List(absl::string_view name, absl::string_view placeholder, absl::string_view help,
                   std::vector<std::string>* out);
  FlagParser& Int(absl::string_view name, absl::string_view placeholder, absl::string_view help,
                  std::optional<int64_t>* out);
  FlagParser& Real(absl::string_view name, absl::string_view placeholder, absl::string_view help,
                   std::optional<double>* out);
  FlagParser& Switch(absl::string_view name, absl::string_view help, bool* out);
  // A second spelling, such as "-o" for "--out".
  FlagParser& Alias(absl::string_view spelling, absl::string_view name);

  // The positional arguments, min..max of them. Usage errors name the flag, the value and what
  // would be right. Everything after "--" is positional.
  absl::StatusOr<std::vector<std::string>> Parse(absl::Span<const std::string> arguments,
                                                 int min_positionals, int max_positionals);

  std::string Help() const;

  // "--help" or "-h" anywhere before "--".
  static bool HelpAsked(absl::Span<const std::string> arguments);

 private:
  enum class Repeat { kOnce, kMany };
  struct Flag {
    std::string name;         // "--budget"
    std::string placeholder;  // empty for a switch
    std::string help;
    Repeat repeat = Repeat::kOnce;
    std::function<absl::Status(const std::string& value)> set;
    bool seen = false;
  };
  struct AliasName {
    std::string spelling;
    std::string name;
  };

  FlagParser& Add(absl::string_view name, absl::string_view placeholder, absl::string_view help,
                  Repeat repeat, std::function<absl::Status(const std::string&)> set);
  Flag* Find(absl::string_view spelling);
  absl::Status Unknown(absl::string_view spelling) const;

  const std::string command_;
  const std::string synopsis_;
  const std::string summary_;
  std::vector<Flag> flags_;
  std::vector<AliasName> aliases_;
};

// The candidate closest to `word`, or "" when none is close.
std::string NearestName(absl::string_view word, absl::Span<const std::string> candidates);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_FLAG_PARSER_H_
