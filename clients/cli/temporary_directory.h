// A directory of its own, removed with everything in it. Movable, not copyable.
#ifndef KEEPSET_CLIENTS_CLI_TEMPORARY_DIRECTORY_H_
#define KEEPSET_CLIENTS_CLI_TEMPORARY_DIRECTORY_H_

#include <string>
#include <utility>

#include "absl/status/statusor.h"

namespace keepset::cli {

class TemporaryDirectory {
 public:
  static absl::StatusOr<TemporaryDirectory> Create();
  TemporaryDirectory(TemporaryDirectory&& other) noexcept
      : path_(std::exchange(other.path_, std::string())) {}
  TemporaryDirectory& operator=(TemporaryDirectory&&) = delete;
  ~TemporaryDirectory();

  const std::string& path() const { return path_; }

 private:
  explicit TemporaryDirectory(std::string path) : path_(std::move(path)) {}

  std::string path_;
};

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_TEMPORARY_DIRECTORY_H_
