// keepsetd. Exit codes: 0 drained, 2 usage, 3 refused configuration, 5 failure.
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <ctime>
#include <iostream>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/malloc_options.h"
#include "service/server.h"
#include "service/server_config/server_config.h"
#include "service/supervisor.h"

namespace keepset::service {
namespace {

constexpr int kExitUsage = 2;
constexpr int kExitRefused = 3;
constexpr int kExitFailure = 5;
// How soon a second signal is seen while operations end.
constexpr absl::Duration kSignalPoll = absl::Milliseconds(50);

int Complain(const absl::Status& status, int exit_code) {
  std::cerr << "keepsetd: " << status.message() << "\n";
  return exit_code;
}

// A supervisor that cannot be told is no reason to end.
void Tell(absl::string_view notify_socket, absl::string_view state, Logger& log) {
  const absl::Status status = NotifySupervisor(notify_socket, state);
  if (!status.ok()) log.Warning("supervisor", {{"error", std::string(status.message())}});
}

// Waits for running operations and for workers to retire device memory; true when a second signal
// asked to end at once.
bool DrainUntilIdle(Server& server, const sigset_t& signals, absl::Duration timeout,
                    const Clock& clock) {
  server.StartDraining();
  const absl::Duration end = clock.Monotonic() + timeout;
  while (!server.WaitIdle(kSignalPoll) && clock.Monotonic() < end) {
    constexpr timespec kNoWait = {};
    if (sigtimedwait(&signals, nullptr, &kNoWait) > 0) return true;
  }
  return false;
}

int Main(absl::Span<const char* const> arguments, absl::string_view notify_socket) {
  absl::StatusOr<CommandLine> line = ParseCommandLine(arguments);
  if (!line.ok()) {
    return Complain(line.status(), IsUsageError(line.status()) ? kExitUsage : kExitRefused);
  }
  if (line->action == CommandLine::Action::kHelp) {
    std::cout << HelpText();
    return EXIT_SUCCESS;
  }
  if (line->action == CommandLine::Action::kVersion) {
    std::cout << "keepsetd " << ServerVersion() << "\n";
    return EXIT_SUCCESS;
  }
  v1::ServerConfig config = std::move(line->config);
  if (const absl::Status status = ResolveServerConfig(config); !status.ok()) {
    return Complain(status, kExitRefused);
  }

  // Before any thread exists, so that all of them inherit the mask and only this one is woken.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);

  const Clock& clock = SystemClock();
  Logger log(&std::cerr, config.log_format() == "json" ? LogFormat::kJson : LogFormat::kText,
             clock);
  std::random_device random;
  const uint64_t seed = (uint64_t{random()} << 32) | random();
  std::atomic<bool> device_failed = false;
  absl::StatusOr<std::unique_ptr<Server>> server =
      Server::Start(config, {.clock = clock,
                             .log = log,
                             .random_seed = seed,
                             .backend = nullptr,
                             .on_device_fault = [&device_failed] {
                               device_failed = true;
                               kill(getpid(), SIGTERM);
                             }});
  if (!server.ok()) {
    return Complain(server.status(),
                    absl::IsInvalidArgument(server.status()) ? kExitRefused : kExitFailure);
  }

  Tell(notify_socket, kSupervisorReady, log);
  int signal = 0;
  sigwait(&signals, &signal);
  log.Info("signal", {{"number", absl::StrCat(signal)}});
  Tell(notify_socket, kSupervisorStopping, log);
  if (DrainUntilIdle(**server, signals, absl::Milliseconds(config.drain_timeout_ms()), clock)) {
    log.Warning("ended_at_once", {{"operations", absl::StrCat((*server)->operations_running())}});
    std::_Exit(kExitFailure);
  }
  const int64_t left = (*server)->operations_running();
  (*server)->Stop();
  const int exit_code = device_failed ? kExitFailure : EXIT_SUCCESS;
  const uint64_t exported = (*server)->exported_device_bytes();
  if (exported == 0) server->reset();
  log.Info("stopped", {{"operations_cut", absl::StrCat(left)},
                       {"device_bytes_not_retired", absl::StrCat(exported)}});
  // The driver takes it back with the process: freeing what a worker has open is undefined.
  if (exported > 0) std::_Exit(exit_code);
  return exit_code;
}

}  // namespace
}  // namespace keepset::service

int main(int argc, char** argv) {
  keepset::KeepFreedMemory();
  const char* const notify_socket = std::getenv("NOTIFY_SOCKET");
  return keepset::service::Main(absl::MakeConstSpan(argv + 1, argc > 0 ? argc - 1 : 0),
                                notify_socket == nullptr ? "" : notify_socket);
}
