// A keepsetd of our own on a temporary Unix socket, for benchmarks. The process ends with the
// object.
#ifndef KEEPSET_CLIENTS_CLI_SERVER_PROCESS_H_
#define KEEPSET_CLIENTS_CLI_SERVER_PROCESS_H_

#include <sys/types.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "clients/cli/temporary_directory.h"

namespace keepset::cli {

class ServerProcess {
 public:
  // Starts `binary` and waits until it answers. NotFound: no such program. Unavailable: it ended or
  // did not answer in time.
  static absl::StatusOr<std::unique_ptr<ServerProcess>> Start(const std::string& binary);
  ~ServerProcess();
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;

  std::string address() const { return "unix:" + directory_.path() + "/keepset.sock"; }

  // keepsetd beside `program_path`, or where the build tree has it; NotFound names both places.
  static absl::StatusOr<std::string> FindBinary(const std::string& program_path);

 private:
  explicit ServerProcess(TemporaryDirectory directory) : directory_(std::move(directory)) {}

  absl::Status AwaitReady();
  bool Ended();

  TemporaryDirectory directory_;
  pid_t pid_ = -1;
};

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_SERVER_PROCESS_H_
