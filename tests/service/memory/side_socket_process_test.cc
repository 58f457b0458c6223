// Clients of the side socket in processes of their own: another user, killed, forked.
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <string>

#include "gtest/gtest.h"
#include "tests/service/memory/memory_test_support.h"
#include "tests/service/memory/side_socket_fixture.h"

namespace keepset::service {
namespace {

using testing::IsMapped;
using testing::kDenied;
using testing::NewMemfd;
using testing::PageBytes;
using testing::RawSideSocketClient;
using testing::SideSocketTest;
using testing::Whole;

TEST_F(SideSocketTest, PeerOfAnotherUserIsDenied) {
  constexpr uid_t kNobody = 65534;
  options_.mode = 0666;
  options_.allowed_uid = ::geteuid() + 1;
  ASSERT_EQ(::chmod(directory_.File("").c_str(), 0755), 0);
  StartServer();
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    // Root would be let in whatever allowed_uid says.
    if (::geteuid() == 0 && ::setuid(kNobody) != 0) ::_exit(100);
    RawSideSocketClient client(options_.path);
    const auto reply = client.Receive();
    const bool is_closed = reply.has_value() && !client.Receive().has_value();
    ::_exit(is_closed ? reply->code : 101);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), kDenied);
}

// A client process of its own: connects, sends the token and a memfd, reports the fd token through
// a pipe and waits to be killed. Only calls that are safe after fork.
class ClientProcess {
 public:
  ClientProcess(const std::string& path, const SideSocketToken& token, const UniqueFd& memory) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) return;
    UniqueFd reader(ends[0]);
    UniqueFd writer(ends[1]);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // Never outlives the test.
      RawSideSocketClient client(path);
      uint64_t fd_token = 0;
      if (client.SendHello(token) && client.Receive().has_value() &&
          client.SendFds({memory.get()})) {
        const auto reply = client.Receive();
        if (reply.has_value()) fd_token = reply->fd_token;
      }
      if (::write(writer.get(), &fd_token, sizeof(fd_token)) < 0) ::_exit(1);
      while (true) ::pause();
    }
    writer.Reset();
    if (::read(reader.get(), &fd_token_, sizeof(fd_token_)) != sizeof(fd_token_)) fd_token_ = 0;
  }
  ~ClientProcess() { Kill(); }

  uint64_t fd_token() const { return fd_token_; }

  void Kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

 private:
  pid_t pid_ = -1;
  uint64_t fd_token_ = 0;
};

TEST_F(SideSocketTest, KilledClientLeavesNothingBehind) {
  StartServer();
  const SessionInfo session = Open('a');
  UniqueFd memory = NewMemfd("keepset-peer-death", 4 * PageBytes());
  ClientProcess client(options_.path, session.token, memory);
  memory.Reset();
  ASSERT_NE(client.fd_token(), 0u);
  ASSERT_TRUE(sessions_
                  ->RegisterRegion(session.session_id, "kv", client.fd_token(),
                                   Whole("memfd", 4 * PageBytes()))
                  .ok());
  ASSERT_TRUE(IsMapped("memfd:keepset-peer-death"));
  client.Kill();
  EXPECT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kHangUp);
  EXPECT_FALSE(IsMapped("memfd:keepset-peer-death"));
  EXPECT_EQ(sessions_->Counts().sessions, 0);
}

TEST_F(SideSocketTest, InheritedConnectionDoesNotOutliveTheClient) {
#ifdef SYS_pidfd_open
  if (!UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0))).valid()) {
    GTEST_SKIP() << "this kernel has no pidfd_open";
  }
#endif
  StartServer();
  const SessionInfo session = Open('a');
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  const UniqueFd heir_ends(ends[0]);
  UniqueFd test_lives(ends[1]);
  const pid_t client = ::fork();
  ASSERT_GE(client, 0);
  if (client == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    test_lives.Reset();
    RawSideSocketClient connection(options_.path);
    if (!connection.SendHello(session.token) || !connection.Receive().has_value()) ::_exit(1);
    if (::fork() == 0) {
      // Holds the connection until the test closes its pipe, or dies.
      char byte;
      ::_exit(::read(heir_ends.get(), &byte, 1) == 0 ? 0 : 1);
    }
    ::raise(SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(client, &status, 0), client);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kHangUp);
}

TEST_F(SideSocketTest, LeaseSurvivesTheKilledClient) {
  StartServer();
  const SessionInfo session = Open('a');
  UniqueFd memory = NewMemfd("keepset-survivor", 4 * PageBytes());
  ClientProcess client(options_.path, session.token, memory);
  memory.Reset();
  const auto region = sessions_->RegisterRegion(session.session_id, "kv", client.fd_token(),
                                                Whole("memfd", 4 * PageBytes()));
  ASSERT_TRUE(region.ok()) << region.status();
  auto lease = sessions_->Lease(session.session_id, region->region_id);
  ASSERT_TRUE(lease.ok()) << lease.status();
  client.Kill();
  ASSERT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kHangUp);
  EXPECT_EQ(lease->region().data()[200], std::byte{200});
  *lease = RegionLease();
  EXPECT_FALSE(IsMapped("memfd:keepset-survivor"));
}

TEST_F(SideSocketTest, ClientKilledBeforeRegisteringLeavesNoDescriptor) {
  StartServer();
  const int64_t before = testing::CountOpenFds();
  const SessionInfo session = Open('a');
  UniqueFd memory = NewMemfd("k", PageBytes());
  ClientProcess client(options_.path, session.token, memory);
  memory.Reset();
  ASSERT_NE(client.fd_token(), 0u);
  client.Kill();
  ASSERT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kHangUp);
  server_.reset();
  EXPECT_LE(testing::CountOpenFds(), before);
}

}  // namespace
}  // namespace keepset::service
