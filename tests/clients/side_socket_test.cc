// The client's end of the side socket against servers that answer late, wrongly or with too much.
#include "clients/cpp/side_socket.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "proto/side_socket_wire.h"

namespace keepset::client {
namespace {

constexpr int kPatienceMs = 30'000;

// What a server's end of one connection does, as its script asks.
class Peer {
 public:
  explicit Peer(int socket) : socket_(socket) {}
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;
  ~Peer() { ::close(socket_); }

  // Size of what came, 0 when the client has hung up.
  ssize_t Read() {
    wire::SideSocketRequest request;
    return ::recv(socket_, &request, sizeof(request), 0);
  }
  void Answer(uint64_t fd_token, int fd = -1, int32_t code = 0) {
    wire::SideSocketReply reply;
    reply.fd_token = fd_token;
    reply.code = code;
    iovec bytes = {&reply, sizeof(reply)};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message = {};
    message.msg_iov = &bytes;
    message.msg_iovlen = 1;
    if (fd >= 0) {
      message.msg_control = control;
      message.msg_controllen = sizeof(control);
      cmsghdr* const header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(sizeof(int));
      std::memcpy(CMSG_DATA(header), &fd, sizeof(int));
    }
    static_cast<void>(::sendmsg(socket_, &message, MSG_NOSIGNAL));
  }

 private:
  const int socket_;
};

// A pipe of which one end is given away: it is at its end when nobody holds that any more.
class Pipe {
 public:
  Pipe() { static_cast<void>(::pipe(ends_)); }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;
  ~Pipe() {
    ::close(ends_[0]);
    CloseWriter();
  }
  int writer() const { return ends_[1]; }
  void CloseWriter() {
    if (ends_[1] >= 0) ::close(ends_[1]);
    ends_[1] = -1;
  }
  bool IsAtItsEnd() {
    CloseWriter();
    pollfd polled = {ends_[0], POLLIN, 0};
    return ::poll(&polled, 1, 0) == 1 && (polled.revents & POLLHUP) != 0;
  }

 private:
  int ends_[2] = {-1, -1};
};

class SideSocketTest : public ::testing::Test {
 protected:
  SideSocketTest() {
    std::string pattern = ::testing::TempDir() + "/sideXXXXXX";
    directory_ = ::mkdtemp(pattern.data());
    path_ = directory_ + "/s";
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.data(), path_.size());
    listener_ = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    EXPECT_EQ(::bind(listener_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(::listen(listener_, 1), 0);
  }
  ~SideSocketTest() override {
    client_ = nullptr;
    AwaitServer();
    ::close(listener_);
    std::filesystem::remove_all(directory_);
  }

  // Connects to a server that runs `script` once it has accepted the hello.
  void Connect(std::function<void(Peer&)> script, absl::Duration timeout = absl::Minutes(1)) {
    server_ = std::thread([this, script = std::move(script)] {
      pollfd polled = {listener_, POLLIN, 0};
      if (::poll(&polled, 1, kPatienceMs) != 1) return;
      Peer peer(::accept(listener_, nullptr, nullptr));
      peer.Read();
      peer.Answer(0);
      script(peer);
    });
    auto client =
        SideSocket::Connect(path_, std::string(wire::kSideSocketTokenBytes, 't'), timeout);
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
  }

  // Until the script, and what it uses of its test, is over.
  void AwaitServer() {
    if (server_.joinable()) server_.join();
  }

  std::unique_ptr<SideSocket> client_;

 private:
  std::string directory_;
  std::string path_;
  int listener_ = -1;
  std::thread server_;
};

TEST_F(SideSocketTest, AReplyAfterTheTimeLimitIsNotTakenForTheNextOne) {
  Pipe first;
  std::atomic<bool> may_answer = false;
  Connect(
      [&](Peer& peer) {
        peer.Read();
        may_answer.wait(false);
        peer.Answer(7, first.writer());
        peer.Read();
        peer.Answer(8, first.writer());
      },
      absl::Seconds(1));
  EXPECT_EQ(client_->FetchFd(7).status().code(), absl::StatusCode::kDeadlineExceeded);
  may_answer = true;
  may_answer.notify_all();
  EXPECT_EQ(client_->FetchFd(8).status().code(), absl::StatusCode::kUnavailable);
  AwaitServer();
}

TEST_F(SideSocketTest, AnExchangeWithoutItsReplyHangsUp) {
  ssize_t next = -1;
  Connect([&](Peer& peer) {
    peer.Read();
    peer.Answer(99);
    next = peer.Read();
  });
  EXPECT_FALSE(client_->FetchFd(7).ok());
  EXPECT_EQ(client_->PassFd(STDIN_FILENO).status().code(), absl::StatusCode::kUnavailable);
  AwaitServer();
  EXPECT_EQ(next, 0);
}

TEST_F(SideSocketTest, ADescriptorOfAnotherTokenIsRefusedAndClosed) {
  Pipe other;
  Connect([&](Peer& peer) {
    peer.Read();
    peer.Answer(8, other.writer());
  });
  EXPECT_EQ(client_->FetchFd(7).status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(other.IsAtItsEnd());
}

TEST_F(SideSocketTest, ADescriptorThatNobodyAskedForIsClosed) {
  Pipe unasked;
  Connect([&](Peer& peer) {
    peer.Read();
    peer.Answer(5, unasked.writer());
  });
  EXPECT_EQ(client_->PassFd(STDIN_FILENO).status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(unasked.IsAtItsEnd());
}

TEST_F(SideSocketTest, ARefusalLeavesTheConnectionUsable) {
  Connect([&](Peer& peer) {
    peer.Read();
    peer.Answer(7, -1, static_cast<int32_t>(absl::StatusCode::kNotFound));
    peer.Read();
    peer.Answer(5);
  });
  EXPECT_EQ(client_->FetchFd(7).status().code(), absl::StatusCode::kNotFound);
  const auto token = client_->PassFd(STDIN_FILENO);
  ASSERT_TRUE(token.ok()) << token.status();
  EXPECT_EQ(*token, 5);
}

}  // namespace
}  // namespace keepset::client
