// What the `keepset tables` commands that read records share.
#ifndef KEEPSET_CLIENTS_CLI_RECORD_FLAGS_H_
#define KEEPSET_CLIENTS_CLI_RECORD_FLAGS_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "clients/cli/console.h"
#include "clients/cli/engine_handles.h"
#include "clients/cli/flag_parser.h"
#include "engine/keepset.h"

namespace keepset::cli {

// Record files that one command takes.
inline constexpr int kMostRecordFiles = 1 << 20;

// Refuses a value below `least`.
absl::Status CheckAtLeast(absl::string_view flag, const std::optional<int64_t>& value,
                          int64_t least);

// Refuses a path that leads to no file. The pointers are into `paths`.
absl::StatusOr<std::vector<const char*>> RecordPaths(const std::vector<std::string>& paths);

// The same files for CheckOutput.
std::vector<InputFile> RecordInputs(const std::vector<std::string>& paths);

struct ThreadsFlag {
  std::optional<int64_t> threads;

  void AddTo(FlagParser& parser);
  absl::Status Check() const;
  // As the C ABI takes it: 0 is all cores.
  int32_t value() const { return static_cast<int32_t>(threads.value_or(0)); }
};

// Of commands that fit a table.
struct FitFlags {
  std::optional<int64_t> default_budget;
  std::optional<int64_t> created;

  void AddTo(FlagParser& parser);
  absl::Status Check() const;
};

// Calls `run` with `show` as its progress and returns the report's JSON.
template <typename Options>
absl::StatusOr<std::string> RunOnRecords(Options& options,
                                         keepset_status (*run)(const Options*, keepset_report**),
                                         void (*show)(void* progress, int64_t done, int64_t total),
                                         Console& console) {
  Progress progress(console);
  options.progress = show;
  options.progress_user = &progress;
  keepset_report* raw = nullptr;
  const absl::Status status = FromEngine(run(&options, &raw));
  const std::unique_ptr<keepset_report, CDeleter<keepset_report_destroy>> report(raw);
  progress.Clear();
  if (!status.ok()) return status;
  return keepset_report_json(report.get());
}

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_RECORD_FLAGS_H_
