#include "clients/cli/exit_status.h"

#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"

namespace keepset::cli {
namespace {

constexpr absl::string_view kExitCodeUrl = "keepset.cli/exit_code";

absl::Status Coded(absl::Status status, ExitCode code) {
  status.SetPayload(kExitCodeUrl, absl::Cord(absl::StrCat(static_cast<int>(code))));
  return status;
}

}  // namespace

absl::Status UsageError(absl::string_view message) {
  return Coded(absl::InvalidArgumentError(message), ExitCode::kUsage);
}

absl::Status RefusedError(absl::string_view message) {
  return Coded(absl::InvalidArgumentError(message), ExitCode::kRefused);
}

absl::Status WithExitCode(const absl::Status& status, ExitCode code) {
  return status.ok() ? status : Coded(status, code);
}

absl::Status WithPrefix(absl::string_view prefix, const absl::Status& status) {
  if (status.ok()) return status;
  absl::Status out(status.code(), absl::StrCat(prefix, ": ", status.message()));
  status.ForEachPayload(
      [&out](absl::string_view url, const absl::Cord& payload) { out.SetPayload(url, payload); });
  return out;
}

ExitCode ExitCodeOf(const absl::Status& status) {
  if (status.ok()) return ExitCode::kDone;
  if (absl::optional<absl::Cord> payload = status.GetPayload(kExitCodeUrl); payload.has_value()) {
    int code = 0;
    if (absl::SimpleAtoi(std::string(*payload), &code)) return static_cast<ExitCode>(code);
  }
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
      for (absl::string_view unknown : {"unknown policy", "unknown parameter", "unknown scope"}) {
        if (absl::StrContains(status.message(), unknown)) return ExitCode::kUsage;
      }
      return ExitCode::kRefused;
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kPermissionDenied:
      return ExitCode::kRefused;
    case absl::StatusCode::kUnavailable:
      return ExitCode::kUnreachable;
    default:
      return ExitCode::kFailed;
  }
}

std::string CodeName(const absl::Status& status) { return absl::StatusCodeToString(status.code()); }

}  // namespace keepset::cli
