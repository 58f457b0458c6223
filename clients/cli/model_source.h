// Where a command takes a model fingerprint from.
#ifndef KEEPSET_CLIENTS_CLI_MODEL_SOURCE_H_
#define KEEPSET_CLIENTS_CLI_MODEL_SOURCE_H_

#include <optional>
#include <string>

#include "absl/status/statusor.h"

namespace keepset::cli {

// Exactly one of the two.
struct ModelSource {
  std::optional<std::string> file;  // a JSON object
  std::optional<std::string> like;  // a capture or a table
};

// The fingerprint as JSON. Usage error: none or both, or no such file. Refused: a file that is
// neither.
absl::StatusOr<std::string> ReadModelJson(const ModelSource& source);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_MODEL_SOURCE_H_
