// keepsetd over a CPU that fails or stands still when it is told: SIGUSR1 breaks its device,
// SIGUSR2 closes the gate of its window scores. Each writes a line: "broken", "closed".
#include <pthread.h>

#include <csignal>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <thread>
#include <utility>

#include "absl/types/span.h"
#include "kernels/backend_registry.h"
#include "service/process.h"
#include "tests/fakes/gated_backend.h"

namespace keepset::integration {
namespace {

int Main(absl::Span<const char* const> arguments) {
  sigset_t orders;
  sigemptyset(&orders);
  sigaddset(&orders, SIGUSR1);
  sigaddset(&orders, SIGUSR2);
  sigset_t all = orders;
  sigaddset(&all, SIGTERM);
  sigaddset(&all, SIGINT);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  auto backend = kernels::NewBackend("cpu", {.num_threads = 1});
  if (!backend.ok()) return EXIT_FAILURE;
  fakes::Gate gate;
  std::thread([&gate, orders] {
    int order = 0;
    while (sigwait(&orders, &order) == 0) {
      if (order == SIGUSR1) {
        gate.BreakDevice(absl::InternalError("cuda: illegal address"));
        std::cerr << "broken\n";
      } else {
        gate.Close();
        std::cerr << "closed\n";
      }
    }
  }).detach();
  // The thread above uses the gate to the end.
  std::_Exit(service::RunProcess(arguments, "",
                                 std::make_unique<fakes::GatedBackend>(*std::move(backend), gate)));
}

}  // namespace
}  // namespace keepset::integration

int main(int argc, char** argv) {
  return keepset::integration::Main(absl::MakeConstSpan(argv + 1, argc > 0 ? argc - 1 : 0));
}
