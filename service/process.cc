#include "service/process.h"

#include <csignal>
#include <cstdlib>
#include <iostream>
#include <random>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/clock.h"
#include "base/log.h"
#include "service/end_watch.h"
#include "service/server.h"
#include "service/server_config/server_config.h"
#include "service/supervisor.h"

namespace keepset::service {
namespace {

constexpr int kExitUsage = 2;
constexpr int kExitRefused = 3;
constexpr int kExitFailure = 5;

int Complain(const absl::Status& status, int exit_code) {
  std::cerr << "keepsetd: " << status.message() << "\n";
  return exit_code;
}

// A supervisor that cannot be told is no reason to end.
void Tell(absl::string_view notify_socket, absl::string_view state, Logger& log) {
  const absl::Status status = NotifySupervisor(notify_socket, state);
  if (!status.ok()) log.Warning("supervisor", {{"error", std::string(status.message())}});
}

// The server as the thread sees it that ends the process at once. Thread-safe.
class RunningServer {
 public:
  void Set(const Server* server) {
    const absl::MutexLock lock(&mutex_);
    server_ = server;
  }
  int64_t operations() const {
    const absl::MutexLock lock(&mutex_);
    return server_ == nullptr ? 0 : server_->operations_running();
  }

 private:
  mutable absl::Mutex mutex_;
  const Server* server_ ABSL_GUARDED_BY(mutex_) = nullptr;
};

}  // namespace

int RunProcess(absl::Span<const char* const> arguments, absl::string_view notify_socket,
               std::unique_ptr<kernels::ComputeBackend> backend) {
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

  std::signal(SIGPIPE, SIG_IGN);
  const Clock& clock = SystemClock();
  Logger log(&std::cerr, config.log_format() == "json" ? LogFormat::kJson : LogFormat::kText,
             clock);
  RunningServer running;
  EndWatch watch(log, [&log, &running] {
    log.Warning("ended_at_once", {{"operations", absl::StrCat(running.operations())}});
    std::_Exit(kExitFailure);
  });
  std::random_device random;
  const uint64_t seed = (uint64_t{random()} << 32) | random();
  absl::StatusOr<std::unique_ptr<Server>> server =
      Server::Start(config, {.clock = clock,
                             .log = log,
                             .random_seed = seed,
                             .backend = std::move(backend),
                             .on_device_fault = [&watch] { watch.EndForFault(); }});
  if (!server.ok()) {
    return Complain(server.status(),
                    absl::IsInvalidArgument(server.status()) ? kExitRefused : kExitFailure);
  }
  running.Set(server->get());

  Tell(notify_socket, kSupervisorReady, log);
  watch.AwaitEnd();
  Tell(notify_socket, kSupervisorStopping, log);
  (*server)->StartDraining();
  // What still runs after it, or is not retired, is counted below.
  static_cast<void>((*server)->WaitIdle(absl::Milliseconds(config.drain_timeout_ms())));
  const int64_t left = (*server)->operations_running();
  (*server)->Stop();
  const int exit_code = watch.has_fault() ? kExitFailure : EXIT_SUCCESS;
  const uint64_t exported = (*server)->exported_device_bytes();
  running.Set(nullptr);
  if (exported == 0) server->reset();
  log.Info("stopped", {{"operations_cut", absl::StrCat(left)},
                       {"device_bytes_not_retired", absl::StrCat(exported)}});
  // The driver takes it back with the process: freeing what a worker has open is undefined.
  if (exported > 0) std::_Exit(exit_code);
  return exit_code;
}

}  // namespace keepset::service
