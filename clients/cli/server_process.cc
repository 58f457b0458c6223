#include "clients/cli/server_process.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <system_error>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "clients/cpp/client.h"

namespace keepset::cli {
namespace {

constexpr absl::Duration kStartTimeout = absl::Seconds(20);
constexpr absl::Duration kStopTimeout = absl::Seconds(10);
constexpr absl::Duration kPollInterval = absl::Milliseconds(20);

}  // namespace

absl::StatusOr<std::string> ServerProcess::FindBinary(const std::string& program_path) {
  const std::filesystem::path directory = std::filesystem::path(program_path).parent_path();
  const std::filesystem::path places[] = {directory / "keepsetd",
                                          directory / "../../service/keepsetd"};
  for (const std::filesystem::path& place : places) {
    std::error_code ignored;
    if (std::filesystem::is_regular_file(place, ignored)) return place.string();
  }
  return absl::NotFoundError(absl::StrCat("no keepsetd at ", places[0].string(), " nor at ",
                                          places[1].string(),
                                          "; name one with --keepsetd, or a "
                                          "running one with --server"));
}

absl::StatusOr<std::unique_ptr<ServerProcess>> ServerProcess::Start(const std::string& binary) {
  KEEPSET_ASSIGN_OR_RETURN(TemporaryDirectory directory, TemporaryDirectory::Create());
  std::unique_ptr<ServerProcess> server(new ServerProcess(std::move(directory)));
  std::vector<std::string> words = {binary, "--listen", server->address(), "--metrics-listen",
                                    "off"};
  std::vector<char*> argv;
  argv.reserve(words.size() + 1);
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  const std::string log = server->directory_.path() + "/keepsetd.log";
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, log.c_str(),
                                   O_WRONLY | O_CREAT | O_TRUNC, 0600);
  posix_spawn_file_actions_adddup2(&actions, STDOUT_FILENO, STDERR_FILENO);
  const int error =
      posix_spawn(&server->pid_, binary.c_str(), &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    server->pid_ = -1;
    return absl::NotFoundError(absl::StrCat(binary, ": ", std::strerror(error)));
  }
  KEEPSET_RETURN_IF_ERROR(server->AwaitReady());
  return server;
}

bool ServerProcess::Ended() {
  if (pid_ < 0) return true;
  if (waitpid(pid_, nullptr, WNOHANG) == 0) return false;
  pid_ = -1;
  return true;
}

absl::Status ServerProcess::AwaitReady() {
  client::ClientOptions options;
  options.address = address();
  options.transport = client::Transport::kInline;
  const absl::Time limit = absl::Now() + kStartTimeout;
  while (absl::Now() < limit) {
    if (Ended()) return absl::UnavailableError("keepsetd ended at once");
    if (client::Client::Connect(options).ok()) return absl::OkStatus();
    absl::SleepFor(kPollInterval);
  }
  return absl::UnavailableError(
      absl::StrCat("keepsetd did not answer within ", absl::FormatDuration(kStartTimeout)));
}

ServerProcess::~ServerProcess() {
  if (Ended()) return;
  kill(pid_, SIGTERM);
  const absl::Time limit = absl::Now() + kStopTimeout;
  while (!Ended()) {
    if (absl::Now() >= limit) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
      return;
    }
    absl::SleepFor(kPollInterval);
  }
}

}  // namespace keepset::cli
