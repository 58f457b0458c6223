#include "service/memory/side_socket_listener.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace keepset::service {
namespace {

constexpr int kBacklog = 64;

absl::StatusOr<sockaddr_un> AddressOf(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path) ||
      path.find('\0') != std::string::npos) {
    return absl::InvalidArgumentError(absl::StrCat(
        "side socket path of ", path.size(), " bytes, want 1..", sizeof(address.sun_path) - 1));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

absl::Status SystemError(absl::string_view what, const std::string& path, int error) {
  return absl::ErrnoToStatus(error, absl::StrCat("side socket ", path, ": ", what));
}

absl::StatusOr<UniqueFd> NewSocket(const std::string& path) {
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) return SystemError("cannot make a socket", path, errno);
  return fd;
}

absl::Status RemoveStale(const std::string& path, const sockaddr_un& address) {
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0) {
    return errno == ENOENT ? absl::OkStatus() : SystemError("cannot examine", path, errno);
  }
  if (!S_ISSOCK(info.st_mode)) {
    return absl::AlreadyExistsError(
        absl::StrCat("side socket ", path, ": a file that is no socket is there"));
  }
  KEEPSET_ASSIGN_OR_RETURN(const UniqueFd probe, NewSocket(path));
  if (::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0 ||
      errno != ECONNREFUSED) {
    return absl::AlreadyExistsError(
        absl::StrCat("side socket ", path, ": in use by another process, want a free path"));
  }
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) {
    return SystemError("cannot remove the stale socket", path, errno);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SideSocketListener> SideSocketListener::Bind(const std::string& path, mode_t mode) {
  KEEPSET_ASSIGN_OR_RETURN(const sockaddr_un address, AddressOf(path));
  KEEPSET_RETURN_IF_ERROR(RemoveStale(path, address));
  KEEPSET_ASSIGN_OR_RETURN(UniqueFd fd, NewSocket(path));
  // Linux gives the file the socket's own mode, so it never exists with a wider one than asked;
  // chmod then restores what the umask took.
  if (::fchmod(fd.get(), mode) != 0) return SystemError("cannot set its mode", path, errno);
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return SystemError("cannot bind", path, errno);
  }
  struct stat info = {};
  if (::lstat(path.c_str(), &info) != 0) return SystemError("vanished", path, errno);
  SideSocketListener listener(std::move(fd), path, info.st_dev, info.st_ino);
  if (::chmod(path.c_str(), mode) != 0) return SystemError("cannot set its mode", path, errno);
  if (::listen(listener.fd(), kBacklog) != 0) return SystemError("cannot listen", path, errno);
  return listener;
}

SideSocketListener::~SideSocketListener() {
  if (!fd_.valid()) return;
  struct stat info;
  if (::lstat(path_.c_str(), &info) == 0 && info.st_dev == device_ && info.st_ino == inode_) {
    ::unlink(path_.c_str());
  }
}

}  // namespace keepset::service
