#include "service/memory/side_socket_listener.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace keepset::service {
namespace {

constexpr int kBacklog = 64;

}  // namespace

absl::StatusOr<SideSocketListener> SideSocketListener::Bind(const std::string& path, mode_t mode) {
  const std::string label = absl::StrCat("side socket ", path);
  const auto failed = [&label](absl::string_view what, int error) {
    return absl::ErrnoToStatus(error, absl::StrCat(label, ": ", what));
  };
  KEEPSET_ASSIGN_OR_RETURN(SocketPath claimed, SocketPath::Claim(path, label));
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) return failed("cannot make a socket", errno);
  // Linux gives the file the socket's own mode, so it never exists with a wider one than asked;
  // chmod then restores what the umask took.
  if (::fchmod(fd.get(), mode) != 0) return failed("cannot set its mode", errno);
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&claimed.address()),
             sizeof(claimed.address())) != 0) {
    return failed("cannot bind", errno);
  }
  KEEPSET_RETURN_IF_ERROR(claimed.NoteSocket());
  SideSocketListener listener(std::move(claimed), std::move(fd));
  if (::chmod(path.c_str(), mode) != 0) return failed("cannot set its mode", errno);
  if (::listen(listener.fd(), kBacklog) != 0) return failed("cannot listen", errno);
  return listener;
}

}  // namespace keepset::service
