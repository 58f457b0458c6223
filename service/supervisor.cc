#include "service/supervisor.h"

#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstddef>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {

absl::Status NotifySupervisor(absl::string_view notify_socket, absl::string_view state) {
  if (notify_socket.empty()) return absl::OkStatus();
  sockaddr_un address = {};
  if ((notify_socket[0] != '/' && notify_socket[0] != '@') ||
      notify_socket.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat("NOTIFY_SOCKET=\"", notify_socket,
                                                   "\", want /path or @name of at most ",
                                                   sizeof(address.sun_path) - 1, " bytes"));
  }
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, notify_socket.data(), notify_socket.size());
  if (notify_socket[0] == '@') address.sun_path[0] = '\0';
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + notify_socket.size());
  const UniqueFd socket(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (::sendto(socket.get(), state.data(), state.size(), MSG_NOSIGNAL,
               reinterpret_cast<const sockaddr*>(&address), size) < 0) {
    const int error = errno;
    return absl::UnavailableError(
        absl::StrCat("NOTIFY_SOCKET=\"", notify_socket, "\": ", std::strerror(error)));
  }
  return absl::OkStatus();
}

}  // namespace keepset::service
