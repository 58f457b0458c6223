// keepsetd on a device of host memory: the real server, for tests of the life of memory between
// processes.
//
//   host_device_server ... --listen ADDRESS ... [--metrics-listen HOST:PORT]
//
// Other words are ignored; ends with SIGTERM.
#include <signal.h>

#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <utility>

#include "base/clock.h"
#include "base/log.h"
#include "kernels/backend_registry.h"
#include "service/server.h"
#include "service/server_config/server_config.h"
#include "tests/fakes/gated_backend.h"
#include "tests/gpu/host_device.h"

namespace keepset::gpu {
namespace {

int Main(const std::string& address, const std::string& metrics) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  auto config = service::ParseServerConfig("", "test");
  auto backend = kernels::NewBackend("cpu", {.num_threads = 1});
  if (!config.ok() || !backend.ok()) return EXIT_FAILURE;
  config->add_listen(address);
  config->set_metrics_listen(metrics);
  config->mutable_memory()->set_quarantine_seconds(1);
  if (!service::ResolveServerConfig(*config).ok()) return EXIT_FAILURE;
  Logger log(&std::cerr, LogFormat::kText, SystemClock());
  fakes::Gate gate;
  auto server = service::Server::Start(
      *config, {.clock = SystemClock(),
                .log = log,
                .random_seed = 1,
                .backend = std::make_unique<HostDevice>(*std::move(backend), gate),
                .on_device_fault = [] {}});
  if (!server.ok()) {
    std::cerr << server.status() << "\n";
    return EXIT_FAILURE;
  }
  int signal = 0;
  sigwait(&signals, &signal);
  return EXIT_SUCCESS;
}

}  // namespace
}  // namespace keepset::gpu

int main(int argc, char** argv) {
  std::string address;
  std::string metrics = "off";
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::string(argv[i]) == "--listen") address = argv[i + 1];
    if (std::string(argv[i]) == "--metrics-listen") metrics = argv[i + 1];
  }
  return address.empty() ? EXIT_FAILURE : keepset::gpu::Main(address, metrics);
}
