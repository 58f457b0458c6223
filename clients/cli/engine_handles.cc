#include "clients/cli/engine_handles.h"

#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "clients/cli/exit_status.h"

namespace keepset::cli {

absl::StatusOr<EngineHandle> NewEngine(int64_t num_threads) {
  if (num_threads < 0 || num_threads > INT32_MAX) {
    return RefusedError(
        absl::StrCat("--threads=", num_threads, ", want 0..", INT32_MAX, " (0: all cores)"));
  }
  keepset_engine_options options = {};
  options.struct_size = sizeof(options);
  options.num_threads = static_cast<int32_t>(num_threads);
  keepset_engine* engine = nullptr;
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_engine_create(&options, &engine)));
  return EngineHandle(engine);
}

absl::Status CheckFileExists(const std::string& what, const std::string& path) {
  struct stat info = {};
  if (stat(path.c_str(), &info) != 0) {
    return UsageError(absl::StrCat(what, " ", path, ": ", std::strerror(errno)));
  }
  if (S_ISDIR(info.st_mode)) {
    return UsageError(absl::StrCat(what, " ", path, ": is a directory, want a file"));
  }
  return absl::OkStatus();
}

absl::Status CheckOutput(const std::string& what, const std::string& path,
                         absl::Span<const InputFile> inputs) {
  if (path.empty()) return UsageError(absl::StrCat(what, " is empty, want a file name"));
  std::filesystem::path parent = std::filesystem::path(path).parent_path();
  if (parent.empty()) parent = ".";
  std::error_code error;
  if (!std::filesystem::is_directory(parent, error)) {
    return UsageError(absl::StrCat(what, " ", path, ": there is no directory ", parent.string()));
  }
  if (std::filesystem::is_directory(path, error)) {
    return UsageError(absl::StrCat(what, " ", path, ": is a directory, want a file name"));
  }
  // A file is written beside its name and renamed, which would put a file in a device's place.
  if (std::filesystem::exists(path, error) && !std::filesystem::is_regular_file(path, error)) {
    return UsageError(absl::StrCat(what, " ", path, ": is no regular file, want a file name"));
  }
  for (const InputFile& input : inputs) {
    if (std::filesystem::equivalent(path, input.path, error)) {
      return UsageError(absl::StrCat(what, " ", path, ": is the same file as the ", input.what, " ",
                                     input.path, ", want another file name"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<CaptureHandle> OpenCapture(const std::string& path) {
  KEEPSET_RETURN_IF_ERROR(CheckFileExists("capture", path));
  keepset_capture* capture = nullptr;
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_capture_open(path.c_str(), &capture)));
  return CaptureHandle(capture);
}

absl::StatusOr<TableHandle> LoadTable(const std::string& path) {
  KEEPSET_RETURN_IF_ERROR(CheckFileExists("table", path));
  keepset_table* table = nullptr;
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_table_load(path.c_str(), &table)));
  return TableHandle(table);
}

}  // namespace keepset::cli
