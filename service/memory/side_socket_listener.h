// The listening end of an AF_UNIX SOCK_SEQPACKET socket and its file.
#ifndef KEEPSET_SERVICE_MEMORY_SIDE_SOCKET_LISTENER_H_
#define KEEPSET_SERVICE_MEMORY_SIDE_SOCKET_LISTENER_H_

#include <sys/types.h>

#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "service/memory/memory_transport.h"
#include "service/memory/socket_path.h"

namespace keepset::service {

// Removes its socket file when it goes. Movable.
class SideSocketListener {
 public:
  // The errors of SocketPath::Claim. Other codes: the system refused. A socket nobody answers on is
  // replaced.
  static absl::StatusOr<SideSocketListener> Bind(const std::string& path, mode_t mode);

  SideSocketListener(SideSocketListener&&) = default;
  SideSocketListener& operator=(SideSocketListener&&) = delete;

  // Non-blocking.
  int fd() const { return fd_.get(); }

 private:
  SideSocketListener(SocketPath path, UniqueFd fd) : path_(std::move(path)), fd_(std::move(fd)) {}

  SocketPath path_;
  UniqueFd fd_;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_SIDE_SOCKET_LISTENER_H_
