// Which process a Unix socket's peer is taken for.
#include "service/memory/peer_process.h"

#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "gtest/gtest.h"
#include "tests/service/memory/memory_test_support.h"

namespace keepset::service {
namespace {

constexpr int kDeadlineMs = 10'000;

bool IsReadable(int fd, int timeout_ms) {
  pollfd polled = {fd, POLLIN, 0};
  return ::poll(&polled, 1, timeout_ms) > 0;
}

// A process that waits to be killed.
class Process {
 public:
  template <typename Work>
  explicit Process(Work before_it_waits) : id_(::fork()) {
    if (id_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      before_it_waits();
      while (true) ::pause();
    }
  }
  ~Process() { Kill(); }
  pid_t id() const { return id_; }
  void Kill() {
    if (id_ <= 0) return;
    ::kill(id_, SIGKILL);
    ::waitpid(id_, nullptr, 0);
    id_ = -1;
  }

 private:
  pid_t id_;
};

class PeerSocket : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0))).valid()) {
      GTEST_SKIP() << "this kernel has no pidfd_open";
    }
    address_.sun_family = AF_UNIX;
    std::strncpy(address_.sun_path, path_.c_str(), sizeof(address_.sun_path) - 1);
    ASSERT_EQ(::bind(listener_.get(), Address(), sizeof(address_)), 0);
    ASSERT_EQ(::listen(listener_.get(), 4), 0);
  }
  const sockaddr* Address() const { return reinterpret_cast<const sockaddr*>(&address_); }
  // For the peer's process, which it ends when that fails.
  void ConnectOrExit() const {
    const int socket = ::socket(AF_UNIX, SOCK_SEQPACKET, 0);
    if (::connect(socket, Address(), sizeof(address_)) != 0) ::_exit(1);
  }
  UniqueFd Accept() const {
    EXPECT_TRUE(IsReadable(listener_.get(), kDeadlineMs));
    return UniqueFd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
  }

  const testing::TemporaryDirectory directory_;
  const std::string path_ = directory_.File("peer.sock");
  const UniqueFd listener_{::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)};
  sockaddr_un address_ = {};
};

class PeerProcessTest : public PeerSocket, public ::testing::WithParamInterface<PeerLookup> {};

TEST_P(PeerProcessTest, ThePeersEndIsSeen) {
  Process peer([&] { ConnectOrExit(); });
  const UniqueFd socket = Accept();
  const auto process = PeerProcess(socket.get(), peer.id(), GetParam());
  ASSERT_TRUE(process.ok()) << process.status();
  ASSERT_TRUE(process->valid());
  EXPECT_FALSE(IsReadable(process->get(), 0));
  peer.Kill();
  EXPECT_TRUE(IsReadable(process->get(), kDeadlineMs));
}

// Between the connect and the accept the peer ends and its number becomes another process's.
TEST_P(PeerProcessTest, AProcessThatHasThePeersNumberNowIsNotTakenForIt) {
  Process peer([&] { ConnectOrExit(); });
  EXPECT_TRUE(IsReadable(listener_.get(), kDeadlineMs));
  peer.Kill();
  const Process another([] {});
  const UniqueFd socket = Accept();
  const auto process = PeerProcess(socket.get(), another.id(), GetParam());
  ASSERT_TRUE(process.ok()) << process.status();
  EXPECT_TRUE(!process->valid() || IsReadable(process->get(), 0));
}

INSTANTIATE_TEST_SUITE_P(EveryLookup, PeerProcessTest,
                         ::testing::Values(PeerLookup::kBySocket, PeerLookup::kByNumber),
                         [](const auto& info) {
                           return info.param == PeerLookup::kBySocket ? "BySocket" : "ByNumber";
                         });

// The peer of a server in a PID namespace of its own has no number there.
class PeerWithoutANumber : public PeerSocket {};

TEST_F(PeerWithoutANumber, IsKnownBySocket) {
  Process peer([&] { ConnectOrExit(); });
  const UniqueFd socket = Accept();
  const auto process = PeerProcess(socket.get(), 0, PeerLookup::kBySocket);
  ASSERT_TRUE(process.ok()) << process.status();
  if (!process->valid()) GTEST_SKIP() << "this kernel has no SO_PEERPIDFD";
  EXPECT_FALSE(IsReadable(process->get(), 0));
  peer.Kill();
  EXPECT_TRUE(IsReadable(process->get(), kDeadlineMs));
}

TEST_F(PeerWithoutANumber, IsNotLookedForByNumber) {
  const Process peer([&] { ConnectOrExit(); });
  const UniqueFd socket = Accept();
  const auto process = PeerProcess(socket.get(), 0, PeerLookup::kByNumber);
  ASSERT_TRUE(process.ok()) << process.status();
  EXPECT_FALSE(process->valid());
}

}  // namespace
}  // namespace keepset::service
