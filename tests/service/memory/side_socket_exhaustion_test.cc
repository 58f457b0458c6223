// The side socket when the process has no descriptor left.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"
#include "proto/side_socket_wire.h"
#include "tests/service/memory/memory_test_support.h"
#include "tests/service/memory/side_socket_fixture.h"

namespace keepset::service {
namespace {

using ::testing::HasSubstr;
using testing::kExhausted;
using testing::NewMemfd;
using testing::PageBytes;
using testing::SideSocketTest;

// Restores the soft limit of open files.
class ScopedNofile {
 public:
  explicit ScopedNofile(rlim_t limit) {
    ::getrlimit(RLIMIT_NOFILE, &before_);
    const rlimit lowered = {limit, before_.rlim_max};
    ::setrlimit(RLIMIT_NOFILE, &lowered);
  }
  ~ScopedNofile() { ::setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_ = {};
};

// One above the highest descriptor in use when none below is free.
rlim_t FillDescriptorTable(std::vector<UniqueFd>& fillers) {
  int highest = 2;
  for (int fd = 3; fd < 1024; ++fd) {
    if (::fcntl(fd, F_GETFD) >= 0) highest = fd;
  }
  while (true) {
    UniqueFd filler(::fcntl(0, F_DUPFD_CLOEXEC, 3));
    if (filler.get() > highest) return static_cast<rlim_t>(highest) + 1;
    fillers.push_back(std::move(filler));
  }
}

TEST_F(SideSocketTest, DescriptorThatFindsNoRoomIsResourceExhausted) {
  StartServer();
  const SessionInfo session = Open('a');
  const auto client = Bind(session);
  const UniqueFd memory = NewMemfd("k", PageBytes());
  std::optional<wire::SideSocketReply> reply;
  {
    std::vector<UniqueFd> fillers;
    const ScopedNofile limit(FillDescriptorTable(fillers));
    ASSERT_TRUE(client->SendFds({memory.get()}));
    reply = client->Receive();
  }
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->code, kExhausted);
  Bind(Open('b'));
}

// What a connection is told while this process has room for `left` more descriptors; none: nothing,
// before the deadline.
std::optional<int32_t> GreetingWithRoomFor(rlim_t left, const std::string& path) {
  const UniqueFd waiting(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  const timeval deadline = {10, 0};
  ::setsockopt(waiting.get(), SOL_SOCKET, SO_RCVTIMEO, &deadline, sizeof(deadline));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
  std::vector<UniqueFd> fillers;
  const ScopedNofile limit(FillDescriptorTable(fillers) + left);
  EXPECT_EQ(::connect(waiting.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  wire::SideSocketReply received;
  const ssize_t size = ::recv(waiting.get(), &received, sizeof(received), 0);
  return size == static_cast<ssize_t>(sizeof(received)) ? std::make_optional(received.code)
                                                        : std::nullopt;
}

TEST_F(SideSocketTest, ConnectionThatFindsNoRoomIsTurnedAway) {
  StartServer();
  EXPECT_EQ(GreetingWithRoomFor(0, options_.path), kExhausted);
  Bind(Open('b'));
}

// Its session's memory would be freed after a guessed time.
TEST_F(SideSocketTest, ConnectionWhoseProcessFindsNoRoomToBeWatchedIsTurnedAway) {
  if (!UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0))).valid()) {
    GTEST_SKIP() << "this kernel has no pidfd_open";
  }
  StartServer();
  EXPECT_EQ(GreetingWithRoomFor(1, options_.path), kExhausted);
  Bind(Open('b'));
}

// poll then refuses to wait for all of them together.
class SideSocketUnderALoweredLimit : public SideSocketTest {
 protected:
  static constexpr int kConnections = 8;
  static constexpr rlim_t kLimit = 4;

  SideSocketUnderALoweredLimit() {
    options_.hello_timeout = absl::Seconds(1);
    options_.on_trouble = [this](const absl::Status& why) {
      const absl::MutexLock lock(&mutex_);
      troubles_.push_back(why);
    };
  }

  absl::Mutex mutex_;
  std::vector<absl::Status> troubles_ ABSL_GUARDED_BY(mutex_);
};

TEST_F(SideSocketUnderALoweredLimit, HelloDeadlineAndHangUpAreSeen) {
  StartServer();
  std::vector<SessionInfo> sessions;
  std::vector<std::unique_ptr<testing::RawSideSocketClient>> clients;
  testing::RawSideSocketClient silent(options_.path);
  for (int i = 0; i < kConnections; ++i) {
    sessions.push_back(Open(static_cast<char>('a' + i)));
    clients.push_back(Bind(sessions.back()));
  }
  pollfd hung_up = {silent.fd(), POLLIN, 0};
  const ScopedNofile limit(kLimit);
  EXPECT_EQ(::poll(&hung_up, 1, 10'000), 1);
  clients[3].reset();
  EXPECT_EQ(observer_.AwaitEnd(sessions[3].session_id), SessionEnd::kHangUp);
  ASSERT_TRUE(clients[0]->SendHello(sessions[0].token));
  EXPECT_EQ(observer_.AwaitEnd(sessions[0].session_id), SessionEnd::kHangUp) << "a malformed frame";
  server_.reset();
  EXPECT_EQ(observer_.AwaitEnd(sessions[1].session_id), SessionEnd::kHangUp);
}

TEST_F(SideSocketUnderALoweredLimit, TroubleIsToldOnce) {
  StartServer();
  std::vector<std::unique_ptr<testing::RawSideSocketClient>> clients;
  for (int i = 0; i < kConnections; ++i) clients.push_back(Bind(Open(static_cast<char>('a' + i))));
  const SessionInfo last = Open('z');
  auto last_client = Bind(last);
  const ScopedNofile limit(kLimit);
  last_client.reset();  // wakes the thread
  EXPECT_EQ(observer_.AwaitEnd(last.session_id), SessionEnd::kHangUp);
  clients.pop_back();
  server_.reset();
  const absl::MutexLock lock(&mutex_);
  ASSERT_EQ(troubles_.size(), 1u);
  EXPECT_THAT(troubles_[0].message(), HasSubstr("descriptors together"));
}

}  // namespace
}  // namespace keepset::service
