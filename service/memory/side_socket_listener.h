// The listening end of an AF_UNIX SOCK_SEQPACKET socket and its file.
#ifndef KEEPSET_SERVICE_MEMORY_SIDE_SOCKET_LISTENER_H_
#define KEEPSET_SERVICE_MEMORY_SIDE_SOCKET_LISTENER_H_

#include <sys/types.h>

#include <string>

#include "absl/status/statusor.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {

// Removes its socket file when it goes, unless another has taken the path meanwhile. Movable.
class SideSocketListener {
 public:
  // InvalidArgument: path empty or too long. AlreadyExists: a live socket, or a file that is no
  // socket, is there. Other codes: the system refused. A socket nobody answers on is replaced.
  static absl::StatusOr<SideSocketListener> Bind(const std::string& path, mode_t mode);

  SideSocketListener(SideSocketListener&&) = default;
  SideSocketListener& operator=(SideSocketListener&&) = delete;
  ~SideSocketListener();

  // Non-blocking.
  int fd() const { return fd_.get(); }

 private:
  SideSocketListener(UniqueFd fd, std::string path, dev_t device, ino_t inode)
      : fd_(std::move(fd)), path_(std::move(path)), device_(device), inode_(inode) {}

  UniqueFd fd_;
  std::string path_;
  dev_t device_;
  ino_t inode_;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_SIDE_SOCKET_LISTENER_H_
