// A Unix listen path that nobody can reach before it has its mode, and that is never taken from a
// running server.
//
// gRPC binds in a private directory (0700) beside the path; Publish sets the mode, moves the socket
// into place and removes the directory.
#ifndef KEEPSET_SERVICE_UNIX_LISTENER_H_
#define KEEPSET_SERVICE_UNIX_LISTENER_H_

#include <sys/types.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace keepset::service {

class UnixListener {
 public:
  // The errors of SocketPath::Claim (service/memory/socket_path.h), which it holds.
  // InvalidArgument, too: no room in a socket address for the private directory.
  static absl::StatusOr<std::unique_ptr<UnixListener>> Prepare(const std::string& path,
                                                               mode_t mode);
  virtual ~UnixListener() = default;  // removes what it published

  // What gRPC is to bind.
  virtual const std::string& private_path() const = 0;
  virtual absl::Status Publish() = 0;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_UNIX_LISTENER_H_
