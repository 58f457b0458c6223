// Tells the process's supervisor what the server does, in the datagram protocol of systemd's
// NOTIFY_SOCKET. Needs no library of it.
#ifndef KEEPSET_SERVICE_SUPERVISOR_H_
#define KEEPSET_SERVICE_SUPERVISOR_H_

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace keepset::service {

inline constexpr absl::string_view kSupervisorReady = "READY=1";
inline constexpr absl::string_view kSupervisorStopping = "STOPPING=1";

// `notify_socket` is the value of the environment's NOTIFY_SOCKET: a path, or "@name" in the
// abstract namespace; empty: nobody asked, OK. InvalidArgument: another form. Unavailable: nobody
// takes the message. Never blocks.
absl::Status NotifySupervisor(absl::string_view notify_socket, absl::string_view state);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_SUPERVISOR_H_
