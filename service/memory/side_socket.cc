#include "service/memory/side_socket.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status_macros.h"
#include "proto/side_socket_wire.h"
#include "service/memory/host_mapping.h"
#include "service/memory/peer_process.h"
#include "service/memory/side_socket_frame.h"
#include "service/memory/side_socket_listener.h"

namespace keepset::service {
namespace {

// Room for more descriptors than a frame may carry, so that a second one is seen and refused
// rather than cut off.
constexpr size_t kMaxFdsReceived = 8;
// Frames of one connection served before the others get their turn.
constexpr int kFramesPerTurn = 16;
// Between two looks at connections that cannot be waited for together.
constexpr int kLookMs = 100;

enum class Fate { kKeep, kClose };

struct Connection {
  UniqueFd socket;
  // pidfd of the peer, shared with its session; null where the kernel does not tell
  // (peer_process.h).
  std::shared_ptr<const UniqueFd> process;
  absl::Duration hello_deadline;
  SideSocketPhase phase = SideSocketPhase::kAwaitingHello;
  std::string session_id;  // kBound
};

struct Received {
  ssize_t size = 0;  // 0: hang-up, negative: errno
  bool is_truncated = false;
  bool has_foreign_control = false;
  uint8_t bytes[sizeof(wire::SideSocketRequest) + 1] = {};
  std::vector<UniqueFd> fds;
};

// Takes over every descriptor the kernel installed, whatever else is wrong with the message.
Received Receive(int socket) {
  Received received;
  iovec data = {received.bytes, sizeof(received.bytes)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxFdsReceived)];
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  received.size = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (received.size < 0) {
    received.size = -errno;
    return received;
  }
  received.is_truncated = (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) {
      received.has_foreign_control = true;
      continue;
    }
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
      received.fds.emplace_back(fd);
    }
  }
  return received;
}

// Whether this process can hold no further descriptor: then the kernel drops a passed one.
bool OutOfDescriptors(int any_fd) {
  const UniqueFd probe(::fcntl(any_fd, F_DUPFD_CLOEXEC, 0));
  return !probe.valid() && (errno == EMFILE || errno == ENFILE);
}

constexpr int kNoDescriptor = -1;

// With a duplicate of `fd` unless it is kNoDescriptor. False when the peer does not take its
// replies.
bool Reply(const Connection& connection, absl::StatusCode code, uint64_t fd_token,
           int fd = kNoDescriptor) {
  wire::SideSocketReply reply;
  reply.code = static_cast<int32_t>(code);
  reply.fd_token = fd_token;
  iovec data = {&reply, sizeof(reply)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (fd != kNoDescriptor) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd, sizeof(int));
  }
  return ::sendmsg(connection.socket.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL) ==
         static_cast<ssize_t>(sizeof(reply));
}

class SideSocketServerImpl : public SideSocketServer {
 public:
  SideSocketServerImpl(const SideSocketOptions& options, SessionManager& sessions,
                       SideSocketListener listener, UniqueFd stop_event, UniqueFd reserve)
      : options_(options),
        sessions_(sessions),
        listener_(std::move(listener)),
        stop_event_(std::move(stop_event)),
        reserve_(std::move(reserve)) {}

  ~SideSocketServerImpl() override {
    if (!thread_.joinable()) return;
    const uint64_t one = 1;
    while (::write(stop_event_.get(), &one, sizeof(one)) < 0 && errno == EINTR) {
    }
    thread_.join();
  }

  absl::Status StartThread() {
    try {
      thread_ = std::thread([this] { Serve(); });
    } catch (const std::system_error& error) {
      return absl::ResourceExhaustedError("side socket: cannot start its thread");
    }
    return absl::OkStatus();
  }

 private:
  void Serve();
  // Waits until a descriptor of `polled`, the first of which is the stop event, has something to
  // say, or a deadline comes.
  void Poll(std::vector<pollfd>& polled);
  int PollTimeoutMs() const;
  void Accept();
  void Admit(UniqueFd socket);
  bool IsFull() const {
    return static_cast<int64_t>(connections_.size()) >= options_.max_connections;
  }
  // A session may end while its client keeps the connection open.
  void DropConnectionsOfEndedSessions();
  // Serves what the connection has sent.
  Fate Read(Connection& connection);
  Fate Handle(Connection& connection, Received received);
  void Close(Connection connection);

  const SideSocketOptions options_;
  SessionManager& sessions_;
  SideSocketListener listener_;
  const UniqueFd stop_event_;
  UniqueFd reserve_;  // given up for a moment to accept and turn away when out of descriptors
  std::thread thread_;
  std::vector<Connection> connections_;  // the thread's own
  bool polls_together_ = true;           // the thread's own
};

void SideSocketServerImpl::Serve() {
  std::vector<pollfd> polled;
  while (true) {
    // Open descriptors only: poll refuses more entries than the process may have descriptors.
    polled.clear();
    polled.push_back({stop_event_.get(), POLLIN, 0});
    polled.push_back({listener_.fd(), POLLIN, 0});
    for (const Connection& connection : connections_) {
      polled.push_back({connection.socket.get(), POLLIN, 0});
      if (connection.process != nullptr) polled.push_back({connection.process->get(), POLLIN, 0});
    }
    Poll(polled);
    if (polled[0].revents != 0) break;

    const absl::Duration now = SystemClock().Monotonic();
    std::vector<Connection> kept;
    size_t next = 2;
    for (Connection& connection : connections_) {
      Fate fate = Fate::kKeep;
      if (polled[next++].revents != 0) fate = Read(connection);
      // A child that inherited the socket keeps it open; the peer is gone all the same.
      if (connection.process != nullptr && polled[next++].revents != 0) fate = Fate::kClose;
      if (connection.phase == SideSocketPhase::kAwaitingHello && connection.hello_deadline <= now) {
        fate = Fate::kClose;
      }
      if (fate == Fate::kKeep) {
        kept.push_back(std::move(connection));
      } else {
        Close(std::move(connection));
      }
    }
    connections_ = std::move(kept);
    if (polled[1].revents != 0) Accept();
  }
  for (Connection& connection : connections_) Close(std::move(connection));
  connections_.clear();
}

void SideSocketServerImpl::Poll(std::vector<pollfd>& polled) {
  if (::poll(polled.data(), polled.size(), PollTimeoutMs()) >= 0) {
    polls_together_ = true;
    return;
  }
  const int error = errno;
  for (pollfd& entry : polled) entry.revents = 0;
  if (error == EINTR) return;
  // The limit on descriptors was lowered under those that are open, or the kernel has no memory.
  if (std::exchange(polls_together_, false) && options_.on_trouble) {
    options_.on_trouble(absl::ErrnoToStatus(
        error, absl::StrCat("side socket: cannot wait for ", polled.size(),
                            " descriptors together, looks at each every ", kLookMs, " ms")));
  }
  ::poll(polled.data(), 1, kLookMs);
  for (pollfd& entry : polled) {
    if (::poll(&entry, 1, 0) < 0) entry.revents = 0;
  }
}

int SideSocketServerImpl::PollTimeoutMs() const {
  absl::Duration nearest = absl::InfiniteDuration();
  for (const Connection& connection : connections_) {
    if (connection.phase == SideSocketPhase::kAwaitingHello) {
      nearest = std::min(nearest, connection.hello_deadline);
    }
  }
  if (nearest == absl::InfiniteDuration()) return -1;
  const absl::Duration left = nearest - SystemClock().Monotonic();
  // Rounded up, so that the loop does not spin through the last millisecond.
  return static_cast<int>(std::clamp<int64_t>(absl::ToInt64Milliseconds(left) + 1, 0, 60'000));
}

void SideSocketServerImpl::Accept() {
  UniqueFd socket(::accept4(listener_.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (socket.valid()) {
    Admit(std::move(socket));
    return;
  }
  if (errno != EMFILE && errno != ENFILE) return;
  // Left in the queue, the connection would wake poll for ever.
  reserve_.Reset();
  socket.Reset(::accept4(listener_.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (socket.valid()) {
    Connection refused;
    refused.socket = std::move(socket);
    Reply(refused, absl::StatusCode::kResourceExhausted, 0);
  }
  reserve_.Reset(::eventfd(0, EFD_CLOEXEC));
}

void SideSocketServerImpl::Admit(UniqueFd socket) {
  Connection connection;
  connection.socket = std::move(socket);
  ucred peer = {};
  socklen_t size = sizeof(peer);
  if (::getsockopt(connection.socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return;
  if (options_.allowed_uid.has_value() && peer.uid != *options_.allowed_uid && peer.uid != 0) {
    Reply(connection, absl::StatusCode::kPermissionDenied, 0);
    return;
  }
  if (IsFull()) DropConnectionsOfEndedSessions();
  if (IsFull()) {
    Reply(connection, absl::StatusCode::kResourceExhausted, 0);
    return;
  }
  absl::StatusOr<UniqueFd> process = PeerProcess(connection.socket.get(), peer.pid);
  if (!process.ok()) {
    // Without it the session's memory would be freed after a guessed time.
    Reply(connection, absl::StatusCode::kResourceExhausted, 0);
    return;
  }
  if (process->valid()) connection.process = std::make_shared<const UniqueFd>(*std::move(process));
  connection.hello_deadline = SystemClock().Monotonic() + options_.hello_timeout;
  connections_.push_back(std::move(connection));
}

void SideSocketServerImpl::DropConnectionsOfEndedSessions() {
  connections_.erase(std::remove_if(connections_.begin(), connections_.end(),
                                    [this](const Connection& connection) {
                                      return connection.phase == SideSocketPhase::kBound &&
                                             !sessions_.CheckSession(connection.session_id).ok();
                                    }),
                     connections_.end());
}

Fate SideSocketServerImpl::Read(Connection& connection) {
  for (int frame = 0; frame < kFramesPerTurn; ++frame) {
    Received received = Receive(connection.socket.get());
    if (received.size == -EAGAIN || received.size == -EINTR) return Fate::kKeep;
    if (received.size <= 0) return Fate::kClose;
    if (Handle(connection, std::move(received)) == Fate::kClose) return Fate::kClose;
  }
  return Fate::kKeep;
}

Fate SideSocketServerImpl::Handle(Connection& connection, Received received) {
  if (received.is_truncated && received.size == sizeof(wire::SideSocketRequest) &&
      OutOfDescriptors(stop_event_.get())) {
    Reply(connection, absl::StatusCode::kResourceExhausted, 0);
    return Fate::kClose;
  }
  absl::StatusOr<SideSocketFrame> frame =
      absl::InvalidArgumentError("truncated, or with other control data than a descriptor");
  if (!received.is_truncated && !received.has_foreign_control) {
    frame = ParseSideSocketFrame(
        absl::MakeConstSpan(received.bytes, static_cast<size_t>(received.size)),
        static_cast<int>(received.fds.size()), connection.phase);
  }
  if (!frame.ok()) {
    Reply(connection, frame.status().code(), 0);
    return Fate::kClose;
  }
  switch (frame->type) {
    case wire::SideSocketFrameType::kHello: {
      absl::StatusOr<std::string> session_id =
          sessions_.RedeemToken(frame->token, connection.process);
      if (!session_id.ok()) {
        Reply(connection, session_id.status().code(), 0);
        return Fate::kClose;
      }
      connection.session_id = *std::move(session_id);
      connection.phase = SideSocketPhase::kBound;
      return Reply(connection, absl::StatusCode::kOk, 0) ? Fate::kKeep : Fate::kClose;
    }
    case wire::SideSocketFrameType::kPassFd: {
      const absl::StatusOr<uint64_t> token =
          sessions_.DepositFd(connection.session_id, std::move(received.fds[0]));
      const bool sent = Reply(connection, token.status().code(), token.value_or(0));
      // The session ended some other way: nothing is left for this connection to do.
      return sent && !absl::IsNotFound(token.status()) ? Fate::kKeep : Fate::kClose;
    }
    case wire::SideSocketFrameType::kFetchFd: {
      const absl::StatusOr<UniqueFd> fd = sessions_.FetchFd(connection.session_id, frame->fd_token);
      const bool sent = Reply(connection, fd.status().code(), frame->fd_token,
                              fd.ok() ? fd->get() : kNoDescriptor);
      const bool has_session = fd.ok() || sessions_.CheckSession(connection.session_id).ok();
      return sent && has_session ? Fate::kKeep : Fate::kClose;
    }
  }
  return Fate::kClose;
}

void SideSocketServerImpl::Close(Connection connection) {
  if (connection.phase == SideSocketPhase::kBound) sessions_.OnHangUp(connection.session_id);
}

}  // namespace

absl::StatusOr<std::unique_ptr<SideSocketServer>> SideSocketServer::Start(
    const SideSocketOptions& options, SessionManager& sessions) {
  KEEPSET_ASSIGN_OR_RETURN(SideSocketListener listener,
                           SideSocketListener::Bind(options.path, options.mode));
  UniqueFd stop_event(::eventfd(0, EFD_CLOEXEC));
  UniqueFd reserve(::eventfd(0, EFD_CLOEXEC));
  if (!stop_event.valid() || !reserve.valid()) {
    return DescriptorError(errno, "start the side socket");
  }
  auto server = std::make_unique<SideSocketServerImpl>(options, sessions, std::move(listener),
                                                       std::move(stop_event), std::move(reserve));
  KEEPSET_RETURN_IF_ERROR(server->StartThread());
  return server;
}

}  // namespace keepset::service
