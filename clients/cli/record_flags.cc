#include "clients/cli/record_flags.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "clients/cli/exit_status.h"

namespace keepset::cli {

absl::Status CheckAtLeast(absl::string_view flag, const std::optional<int64_t>& value,
                          int64_t least) {
  if (!value.has_value() || *value >= least) return absl::OkStatus();
  return RefusedError(absl::StrCat(flag, "=", *value, ", want ", least, " or more"));
}

absl::StatusOr<std::vector<const char*>> RecordPaths(const std::vector<std::string>& paths) {
  std::vector<const char*> pointers;
  for (const std::string& path : paths) {
    KEEPSET_RETURN_IF_ERROR(CheckFileExists("records", path));
    pointers.push_back(path.c_str());
  }
  return pointers;
}

std::vector<InputFile> RecordInputs(const std::vector<std::string>& paths) {
  std::vector<InputFile> inputs;
  inputs.reserve(paths.size());
  for (const std::string& path : paths) inputs.push_back({"records", path});
  return inputs;
}

void ThreadsFlag::AddTo(FlagParser& parser) {
  parser.Int("--threads", "N", "default: all cores", &threads);
}

absl::Status ThreadsFlag::Check() const {
  constexpr int64_t kMost = 1024;
  if (threads.value_or(0) >= 0 && threads.value_or(0) <= kMost) return absl::OkStatus();
  return RefusedError(absl::StrCat("--threads=", *threads, ", want 0..", kMost, " (0: all cores)"));
}

void FitFlags::AddTo(FlagParser& parser) {
  parser.Int("--default-budget", "N", "budget of requests that name none", &default_budget)
      .Int("--created", "SECONDS", "time written to the table, since 1970; default now", &created);
}

absl::Status FitFlags::Check() const {
  KEEPSET_RETURN_IF_ERROR(CheckAtLeast("--default-budget", default_budget, 1));
  return CheckAtLeast("--created", created, 1);
}

}  // namespace keepset::cli
