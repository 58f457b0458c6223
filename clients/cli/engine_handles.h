// Owners of the C ABI's objects, and its statuses as absl statuses.
#ifndef KEEPSET_CLIENTS_CLI_ENGINE_HANDLES_H_
#define KEEPSET_CLIENTS_CLI_ENGINE_HANDLES_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/keepset.h"

namespace keepset::cli {

template <auto kDestroy>
struct CDeleter {
  template <typename T>
  void operator()(T* object) const {
    kDestroy(object);
  }
};

using EngineHandle = std::unique_ptr<keepset_engine, CDeleter<keepset_engine_destroy>>;
using TableHandle = std::unique_ptr<keepset_table, CDeleter<keepset_table_destroy>>;
using OperationHandle = std::unique_ptr<keepset_operation, CDeleter<keepset_operation_destroy>>;
using CaptureHandle = std::unique_ptr<keepset_capture, CDeleter<keepset_capture_close>>;

// Of the last call of this thread.
inline absl::Status FromEngine(keepset_status status) {
  if (status == KEEPSET_OK) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(status), keepset_last_error());
}

// num_threads 0: all cores this process may use.
absl::StatusOr<EngineHandle> NewEngine(int64_t num_threads);

// Usage error for a path that leads to no file.
absl::Status CheckFileExists(const std::string& what, const std::string& path);

// A file that a command reads: what it is to the command, and where it lies.
struct InputFile {
  std::string what;
  std::string path;
};
// Usage error for a file that cannot be written so: its directory is missing, something other than
// a regular file has its name, or it is one of the `inputs`, be it by another path or link.
absl::Status CheckOutput(const std::string& what, const std::string& path,
                         absl::Span<const InputFile> inputs);

absl::StatusOr<CaptureHandle> OpenCapture(const std::string& path);
absl::StatusOr<TableHandle> LoadTable(const std::string& path);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_ENGINE_HANDLES_H_
