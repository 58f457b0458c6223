#include "service/memory/socket_path.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace keepset::service {
namespace {

std::string LockPath(const std::string& path) { return absl::StrCat(path, ".lock"); }

std::string ErrorText(int error) { return std::strerror(error); }

absl::StatusOr<sockaddr_un> AddressOf(const std::string& path, absl::string_view label) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path) ||
      path.find('\0') != std::string::npos) {
    return absl::InvalidArgumentError(absl::StrCat(label, ": a path of ", path.size(),
                                                   " bytes, want 1..", sizeof(address.sun_path) - 1,
                                                   " without NUL"));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

absl::Status CannotOpen(const std::string& lock_path, absl::string_view label, int error) {
  struct stat info;
  if (::lstat(lock_path.c_str(), &info) == 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        label, ": ", lock_path, ": ", ErrorText(error), ", want a file this process can write"));
  }
  const size_t slash = lock_path.rfind('/');
  return absl::FailedPreconditionError(absl::StrCat(
      label, ": directory ", slash == std::string::npos ? "." : lock_path.substr(0, slash), ": ",
      ErrorText(error), ", want one this process can write"));
}

// Whether `fd` is the file at `path`: whoever had the lock before may have removed it.
bool IsAt(const std::string& path, int fd) {
  struct stat opened;
  struct stat there;
  return ::fstat(fd, &opened) == 0 && ::lstat(path.c_str(), &there) == 0 &&
         opened.st_dev == there.st_dev && opened.st_ino == there.st_ino;
}

absl::StatusOr<UniqueFd> Lock(const std::string& path, absl::string_view label) {
  while (true) {
    UniqueFd lock(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!lock.valid()) return CannotOpen(path, label, errno);
    if (::flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
      const int error = errno;
      if (error == EINTR) continue;
      if (error == EWOULDBLOCK) {
        return absl::AlreadyExistsError(
            absl::StrCat(label, ": in use by a running server, which holds ", path));
      }
      return absl::FailedPreconditionError(
          absl::StrCat(label, ": cannot lock ", path, ": ", ErrorText(error)));
    }
    if (IsAt(path, lock.get())) return lock;
  }
}

}  // namespace

absl::Status SocketPath::RemoveStale() const {
  const auto failed = [this](absl::string_view what, int error) {
    return absl::FailedPreconditionError(absl::StrCat(label_, ": ", what, ": ", ErrorText(error)));
  };
  struct stat info;
  if (::lstat(path_.c_str(), &info) != 0) {
    return errno == ENOENT ? absl::OkStatus() : failed("cannot examine", errno);
  }
  if (!S_ISSOCK(info.st_mode)) {
    return absl::FailedPreconditionError(
        absl::StrCat(label_, ": a file that is no socket is there"));
  }
  // A socket of another type refuses the probe with another error.
  const UniqueFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!probe.valid()) return failed("cannot make a socket", errno);
  if (::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address_), sizeof(address_)) == 0 ||
      errno != ECONNREFUSED) {
    return absl::AlreadyExistsError(absl::StrCat(label_, ": in use by a running server"));
  }
  if (::unlink(path_.c_str()) != 0 && errno != ENOENT) {
    return failed("cannot remove the stale socket", errno);
  }
  return absl::OkStatus();
}

absl::StatusOr<SocketPath> SocketPath::Claim(const std::string& path, absl::string_view label) {
  KEEPSET_ASSIGN_OR_RETURN(const sockaddr_un address, AddressOf(path, label));
  KEEPSET_ASSIGN_OR_RETURN(UniqueFd lock, Lock(LockPath(path), label));
  SocketPath claimed(path, std::string(label), address, std::move(lock));
  KEEPSET_RETURN_IF_ERROR(claimed.RemoveStale());
  return claimed;
}

absl::Status SocketPath::NoteSocket() {
  struct stat info;
  if (::lstat(path_.c_str(), &info) != 0) {
    const int error = errno;
    return absl::FailedPreconditionError(absl::StrCat(label_, ": vanished: ", ErrorText(error)));
  }
  socket_ = {info.st_dev, info.st_ino};
  return absl::OkStatus();
}

SocketPath::~SocketPath() {
  if (!lock_.valid()) return;
  struct stat info;
  if (socket_.has_value() && ::lstat(path_.c_str(), &info) == 0 && info.st_dev == socket_->device &&
      info.st_ino == socket_->inode) {
    ::unlink(path_.c_str());
  }
  if (IsAt(LockPath(path_), lock_.get())) ::unlink(LockPath(path_).c_str());
}

}  // namespace keepset::service
