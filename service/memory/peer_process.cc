#include "service/memory/peer_process.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "absl/status/status.h"

namespace keepset::service {
namespace {

// Of asm-generic/socket.h, for headers that are older than the kernel.
constexpr int kPeerPidfd = 77;

absl::Status Exhausted() {
  return absl::ResourceExhaustedError("side socket: no descriptor left to watch the peer with");
}

bool IsExhaustion(int error) { return error == EMFILE || error == ENFILE || error == ENOMEM; }

absl::StatusOr<UniqueFd> OpenByNumber(int socket, pid_t number) {
  UniqueFd process;
#ifdef SYS_pidfd_open
  if (number <= 0) return process;
  process.Reset(static_cast<int>(::syscall(SYS_pidfd_open, number, 0)));
  if (!process.valid()) {
    if (IsExhaustion(errno)) return Exhausted();
    return process;
  }
  // The number is of the time of the connect: a peer that has hung up may have ended since, and the
  // number be another process's.
  pollfd polled = {socket, POLLIN, 0};
  if (::poll(&polled, 1, 0) < 0 || (polled.revents & (POLLHUP | POLLERR)) != 0) process.Reset();
#endif
  return process;
}

}  // namespace

absl::StatusOr<UniqueFd> PeerProcess(int socket, pid_t number, PeerLookup lookup) {
  if (lookup == PeerLookup::kByNumber) return OpenByNumber(socket, number);
  int pidfd = -1;
  socklen_t size = sizeof(pidfd);
  if (::getsockopt(socket, SOL_SOCKET, kPeerPidfd, &pidfd, &size) == 0) return UniqueFd(pidfd);
  if (IsExhaustion(errno)) return Exhausted();
  // The kernel knows the peer, and that it has ended.
  if (errno == EINVAL || errno == ESRCH || errno == ENODATA) return UniqueFd();
  return OpenByNumber(socket, number);
}

}  // namespace keepset::service
