// How commands fail: an absl::Status that carries the exit code of formats.md.
#ifndef KEEPSET_CLIENTS_CLI_EXIT_STATUS_H_
#define KEEPSET_CLIENTS_CLI_EXIT_STATUS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace keepset::cli {

enum class ExitCode {
  kDone = 0,
  kUsage = 2,        // unknown flag, policy, parameter or scope, missing file
  kRefused = 3,      // damaged or unfit file, value out of range, missing signal
  kUnreachable = 4,  // no server, or one that is shutting down
  kFailed = 5,       // deadline, device, internal
};

absl::Status UsageError(absl::string_view message);
absl::Status RefusedError(absl::string_view message);

// `status` with a fixed exit code, whatever its canonical code would give. OK stays OK.
absl::Status WithExitCode(const absl::Status& status, ExitCode code);
// `status` with "prefix: " in front of its message and everything else as it was.
absl::Status WithPrefix(absl::string_view prefix, const absl::Status& status);

// The fixed code, or what the canonical code and message say: a message about an unknown policy,
// parameter or scope is a usage error, a missing or unfit thing is refused input.
ExitCode ExitCodeOf(const absl::Status& status);

// "NOT_FOUND" and the like.
std::string CodeName(const absl::Status& status);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_EXIT_STATUS_H_
