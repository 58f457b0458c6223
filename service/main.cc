// keepsetd. Exit codes: service/process.h.
#include <cstdlib>

#include "absl/types/span.h"
#include "base/malloc_options.h"
#include "service/process.h"

int main(int argc, char** argv) {
  keepset::KeepFreedMemory();
  const char* const notify_socket = std::getenv("NOTIFY_SOCKET");
  return keepset::service::RunProcess(absl::MakeConstSpan(argv + 1, argc > 0 ? argc - 1 : 0),
                                      notify_socket == nullptr ? "" : notify_socket, nullptr);
}
