// What the `keepset tables` commands that write a table share, and those with a file of their own.
#ifndef KEEPSET_CLIENTS_CLI_NEW_TABLE_H_
#define KEEPSET_CLIENTS_CLI_NEW_TABLE_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "clients/cli/console.h"
#include "clients/cli/engine_handles.h"
#include "clients/cli/flag_parser.h"
#include "clients/cli/model_source.h"

namespace keepset::cli {

// Flags of the commands that write a table.
struct NewTableFlags {
  ModelSource model;
  std::optional<std::string> name;
  std::optional<std::string> version;
  std::optional<std::string> out;
  bool json = false;

  void AddTo(FlagParser& parser);
  // `inputs` are what the command reads beside the model.
  absl::Status Check(std::vector<InputFile> inputs) const;
  // Reads the new file back, so that a reported digest is one of a valid table. `report_json`, when
  // not empty, is a JSON document that becomes the key "report".
  absl::Status Report(Console& console, const std::string& report_json = "") const;
};

// A result that cannot be written is no fault of the input.
absl::Status WriteStatus(const absl::Status& status);

absl::Status RunTablesCompile(absl::Span<const std::string> arguments, Console& console);
absl::Status RunTablesRecords(absl::Span<const std::string> arguments, Console& console);
absl::Status RunTablesSign(absl::Span<const std::string> arguments, Console& console);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_NEW_TABLE_H_
