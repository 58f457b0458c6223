// Where a Unix socket of this server lies, and nobody else's.
#ifndef KEEPSET_SERVICE_MEMORY_SOCKET_PATH_H_
#define KEEPSET_SERVICE_MEMORY_SOCKET_PATH_H_

#include <sys/types.h>
#include <sys/un.h>

#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {

// Holds `<path>.lock` locked (flock) from before it looks at the path until after it has removed
// its socket: of two servers that start together one is refused, and none removes the other's
// socket. A lock file that is left over says nothing. Movable.
class SocketPath {
 public:
  // Removes a socket that nobody listens on. label: begins every message, with the path in it.
  // AlreadyExists: another server has the path, or somebody listens on it. InvalidArgument: no path
  // of a socket. FailedPrecondition: a file that is no socket is there; its directory, or the lock
  // file, cannot be used.
  static absl::StatusOr<SocketPath> Claim(const std::string& path, absl::string_view label);

  SocketPath(SocketPath&& other) = default;
  SocketPath& operator=(SocketPath&&) = delete;
  ~SocketPath();  // removes the socket of NoteSocket, unless another lies there, and the lock file

  const std::string& path() const { return path_; }
  const sockaddr_un& address() const { return address_; }
  // The socket that lies at the path now is this server's.
  absl::Status NoteSocket();

 private:
  SocketPath(std::string path, std::string label, const sockaddr_un& address, UniqueFd lock)
      : path_(std::move(path)),
        label_(std::move(label)),
        address_(address),
        lock_(std::move(lock)) {}

  absl::Status RemoveStale() const;

  struct FileId {
    dev_t device;
    ino_t inode;
  };

  std::string path_;
  std::string label_;
  sockaddr_un address_;
  UniqueFd lock_;  // invalid: moved from
  std::optional<FileId> socket_;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_SOCKET_PATH_H_
