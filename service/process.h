// keepsetd as a process: command line, signals, supervisor, and the order in which it ends.
#ifndef KEEPSET_SERVICE_PROCESS_H_
#define KEEPSET_SERVICE_PROCESS_H_

#include <memory>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/compute_backend.h"

namespace keepset::service {

// Runs until a signal or a failed device ends it, and answers the exit code: 0 drained, 2 usage,
// 3 refused configuration, 5 failure. A second signal ends the process at once, with 5. To be
// called before the process has other threads that take signals.
//
// notify_socket: the supervisor's (NOTIFY_SOCKET); empty: none. backend: nullptr: the one named in
// the configuration.
int RunProcess(absl::Span<const char* const> arguments, absl::string_view notify_socket,
               std::unique_ptr<kernels::ComputeBackend> backend);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_PROCESS_H_
