// A table's inspect document as lines for people.
#ifndef KEEPSET_CLIENTS_CLI_TABLE_TEXT_H_
#define KEEPSET_CLIENTS_CLI_TABLE_TEXT_H_

#include <string>

#include "absl/strings/string_view.h"

namespace keepset::cli {

// One "key  value" line per entry, nested keys joined by dots, lists of objects an entry each.
std::string TableText(absl::string_view file, absl::string_view inspect_json);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_TABLE_TEXT_H_
