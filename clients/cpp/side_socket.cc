#include "clients/cpp/side_socket.h"

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/cleanup/cleanup.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "proto/side_socket_wire.h"

namespace keepset::client {
namespace {

constexpr int kNoDescriptor = -1;

absl::Status SocketError(absl::string_view where, int error) {
  const std::string message = absl::StrCat("side socket: ", where, ": ", std::strerror(error));
  if (error == EAGAIN || error == EWOULDBLOCK) return absl::DeadlineExceededError(message);
  if (error == EPIPE) {
    return absl::UnavailableError(absl::StrCat(message, ", want the session opened again"));
  }
  if (error == EACCES || error == EPERM) return absl::PermissionDeniedError(message);
  return absl::UnavailableError(message);
}

// The descriptor that came with a message, kNoDescriptor when none did.
int TakeDescriptor(msghdr& message) {
  int taken = kNoDescriptor;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = kNoDescriptor;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
      if (taken == kNoDescriptor) {
        taken = fd;
      } else {
        close(fd);
      }
    }
  }
  return taken;
}

absl::string_view RefusalOf(wire::SideSocketFrameType type) {
  switch (type) {
    case wire::SideSocketFrameType::kHello:
      return "side socket: the server refused the session token";
    case wire::SideSocketFrameType::kPassFd:
      return "side socket: the server refused the descriptor";
    case wire::SideSocketFrameType::kFetchFd:
      return "side socket: the server has no descriptor for this token";
  }
  return "side socket: refused";
}

struct Answer {
  absl::StatusCode code = absl::StatusCode::kOk;
  uint64_t fd_token = 0;
  int fd = kNoDescriptor;  // the receiver's to close
};

absl::Status Send(int socket, const wire::SideSocketRequest& request, int fd) {
  iovec bytes = {const_cast<wire::SideSocketRequest*>(&request), sizeof(request)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &bytes;
  message.msg_iovlen = 1;
  if (fd != kNoDescriptor) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd, sizeof(int));
  }
  ssize_t sent;
  do {
    sent = sendmsg(socket, &message, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent < 0) return SocketError("send", errno);
  return absl::OkStatus();
}

absl::StatusOr<Answer> Receive(int socket) {
  wire::SideSocketReply reply;
  iovec reply_bytes = {&reply, sizeof(reply)};
  alignas(cmsghdr) char reply_control[CMSG_SPACE(sizeof(int))];
  msghdr reply_message = {};
  reply_message.msg_iov = &reply_bytes;
  reply_message.msg_iovlen = 1;
  reply_message.msg_control = reply_control;
  reply_message.msg_controllen = sizeof(reply_control);
  ssize_t received;
  do {
    received = recvmsg(socket, &reply_message, MSG_CMSG_CLOEXEC);
  } while (received < 0 && errno == EINTR);
  if (received < 0) return SocketError("receive", errno);
  Answer answer;
  answer.fd = TakeDescriptor(reply_message);
  absl::Cleanup close_fd = [&] {
    if (answer.fd != kNoDescriptor) close(answer.fd);
  };
  if (received == 0) return absl::UnavailableError("side socket: closed by the server");
  if (received != sizeof(reply) || reply.magic != wire::kSideSocketMagic) {
    return absl::InternalError(absl::StrCat("side socket: reply of ", received,
                                            " bytes is not of this protocol, want ", sizeof(reply),
                                            " bytes"));
  }
  answer.code = static_cast<absl::StatusCode>(reply.code);
  answer.fd_token = reply.fd_token;
  std::move(close_fd).Cancel();
  return answer;
}

// A refused fetch may name no token.
bool IsReplyTo(const wire::SideSocketRequest& request, const Answer& answer) {
  if (request.type != wire::SideSocketFrameType::kFetchFd) return answer.fd == kNoDescriptor;
  const bool is_refused = answer.code != absl::StatusCode::kOk;
  return answer.fd_token == request.fd_token || (is_refused && answer.fd_token == 0);
}

// One frame, with `fd` attached unless it is kNoDescriptor, and its reply. A frame without its
// reply ends the connection: what comes later would be taken for the reply to the next one.
absl::StatusOr<Answer> Exchange(int socket, const wire::SideSocketRequest& request, int fd) {
  KEEPSET_RETURN_IF_ERROR(Send(socket, request, fd));
  absl::StatusOr<Answer> answer = Receive(socket);
  if (answer.ok() && !IsReplyTo(request, *answer)) {
    if (answer->fd != kNoDescriptor) close(answer->fd);
    answer = absl::InternalError(absl::StrCat("side socket: reply for fd_token=", answer->fd_token,
                                              ", want ", request.fd_token));
  }
  if (!answer.ok()) {
    shutdown(socket, SHUT_RDWR);
    return answer;
  }
  if (answer->code == absl::StatusCode::kOk) return answer;
  if (answer->fd != kNoDescriptor) close(answer->fd);
  return absl::Status(answer->code, RefusalOf(request.type));
}

}  // namespace

absl::StatusOr<std::unique_ptr<SideSocket>> SideSocket::Connect(const std::string& path,
                                                                absl::string_view token,
                                                                absl::Duration timeout) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "side socket: path of ", path.size(), " bytes, want 1..", sizeof(address.sun_path) - 1));
  }
  if (token.size() != wire::kSideSocketTokenBytes) {
    return absl::InvalidArgumentError(absl::StrCat("side socket: token of ", token.size(),
                                                   " bytes, want ", wire::kSideSocketTokenBytes));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  const int socket_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (socket_fd < 0) return SocketError("socket", errno);
  std::unique_ptr<SideSocket> out(new SideSocket(socket_fd));
  const timeval limit = absl::ToTimeval(timeout);
  setsockopt(socket_fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
  setsockopt(socket_fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  if (connect(socket_fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return SocketError(path, errno);
  }
  wire::SideSocketRequest hello;
  hello.type = wire::SideSocketFrameType::kHello;
  std::memcpy(hello.token, token.data(), token.size());
  if (auto reply = Exchange(socket_fd, hello, kNoDescriptor); !reply.ok()) return reply.status();
  return out;
}

SideSocket::~SideSocket() { close(socket_); }

absl::StatusOr<uint64_t> SideSocket::PassFd(int fd) {
  wire::SideSocketRequest request;
  request.type = wire::SideSocketFrameType::kPassFd;
  absl::MutexLock lock(&exchange_mutex_);
  KEEPSET_ASSIGN_OR_RETURN(const Answer answer, Exchange(socket_, request, fd));
  return answer.fd_token;
}

absl::StatusOr<int> SideSocket::FetchFd(uint64_t fd_token) {
  wire::SideSocketRequest request;
  request.type = wire::SideSocketFrameType::kFetchFd;
  request.fd_token = fd_token;
  absl::MutexLock lock(&exchange_mutex_);
  KEEPSET_ASSIGN_OR_RETURN(const Answer answer, Exchange(socket_, request, kNoDescriptor));
  if (answer.fd == kNoDescriptor) {
    return absl::ResourceExhaustedError(
        "side socket: the descriptor did not arrive, this process is out of descriptors "
        "(RLIMIT_NOFILE)");
  }
  return answer.fd;
}

}  // namespace keepset::client
