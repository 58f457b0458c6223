// The AF_UNIX socket that passes file descriptors into sessions (proto/side_socket_wire.h).
//
// Descriptors of memory that the server owns go the other way, on the connection of their session.
// One thread serves all connections with poll; a connection that does not send its token in time,
// sends a malformed frame, or belongs to another user than `allowed_uid` (and is not root) is
// closed. A connection that redeemed its token is its session's life: when the peer hangs up, sends
// a malformed frame or its process dies, the session ends.
#ifndef KEEPSET_SERVICE_MEMORY_SIDE_SOCKET_H_
#define KEEPSET_SERVICE_MEMORY_SIDE_SOCKET_H_

#include <sys/types.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "service/memory/session_manager.h"

namespace keepset::service {

struct SideSocketOptions {
  std::string path;
  mode_t mode = 0600;
  std::optional<uid_t> allowed_uid = std::nullopt;  // absent: whoever the socket's mode lets in
  absl::Duration hello_timeout = absl::Seconds(10);
  int max_connections = 1024;  // more are closed at once
  // Called on the server's thread when it can no longer wait for its connections as it should, and
  // serves them more slowly. May be empty.
  std::function<void(const absl::Status& why)> on_trouble = {};
};

class SideSocketServer {
 public:
  // Binds, listens and starts the thread. A stale socket file is replaced; AlreadyExists: a
  // live one; FailedPrecondition: a file that is no socket. `sessions` must outlive the server.
  static absl::StatusOr<std::unique_ptr<SideSocketServer>> Start(const SideSocketOptions& options,
                                                                 SessionManager& sessions);
  // Closes every connection, joins the thread, removes the socket file.
  virtual ~SideSocketServer() = default;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_SIDE_SOCKET_H_
