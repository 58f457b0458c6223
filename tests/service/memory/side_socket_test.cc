#include "service/memory/side_socket.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/fakes/fake_clock.h"
#include "tests/service/memory/memory_test_support.h"

namespace keepset::service {
namespace {

using testing::ArgsOf;
using testing::IsMapped;
using testing::NewMemfd;
using testing::PageBytes;
using testing::RawSideSocketClient;
using testing::Whole;

constexpr int32_t kOk = static_cast<int32_t>(absl::StatusCode::kOk);
constexpr int32_t kInvalid = static_cast<int32_t>(absl::StatusCode::kInvalidArgument);
constexpr int32_t kDenied = static_cast<int32_t>(absl::StatusCode::kPermissionDenied);
constexpr int32_t kExhausted = static_cast<int32_t>(absl::StatusCode::kResourceExhausted);

class SideSocketTest : public ::testing::Test {
 protected:
  void StartServer() {
    auto server = SideSocketServer::Start(options_, *sessions_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  SessionInfo Open(char uuid) {
    auto info = sessions_->OpenSession(ArgsOf(uuid));
    EXPECT_TRUE(info.ok()) << info.status();
    return info.value_or(SessionInfo());
  }

  // A connection that has redeemed the session's token.
  std::unique_ptr<RawSideSocketClient> Bind(const SessionInfo& session) {
    auto client = std::make_unique<RawSideSocketClient>(options_.path);
    EXPECT_TRUE(client->SendHello(session.token));
    const auto reply = client->Receive();
    EXPECT_TRUE(reply.has_value() && reply->code == kOk);
    return client;
  }

  // The session that sent a bad frame is told and ends; the next one is served.
  void ExpectClosedWithoutHarm(RawSideSocketClient& client, const SessionInfo& session) {
    const auto reply = client.Receive();
    ASSERT_TRUE(reply.has_value());
    EXPECT_EQ(reply->code, kInvalid);
    EXPECT_FALSE(client.Receive().has_value());
    EXPECT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kHangUp);
    Bind(Open('z'));
  }

  testing::TemporaryDirectory directory_;
  fakes::FakeClock clock_;
  testing::RecordingObserver observer_;
  std::unique_ptr<SessionManager> sessions_ = SessionManager::New(
      SessionLimits(), NewBuiltinTransports([](absl::string_view kind) { return kind == "memfd"; }),
      clock_, &observer_);
  SideSocketOptions options_ = [this] {
    SideSocketOptions options;
    options.path = directory_.File("side.sock");
    return options;
  }();
  std::unique_ptr<SideSocketServer> server_;
};

TEST_F(SideSocketTest, PassedDescriptorBecomesARegion) {
  StartServer();
  const SessionInfo session = Open('a');
  const auto client = Bind(session);
  const UniqueFd memory = NewMemfd("keepset-passed", PageBytes());
  ASSERT_TRUE(client->SendFds({memory.get()}));
  const auto reply = client->Receive();
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->code, kOk);
  const auto region = sessions_->RegisterRegion(session.session_id, "kv", reply->fd_token,
                                                Whole("memfd", PageBytes()));
  ASSERT_TRUE(region.ok()) << region.status();
  const auto lease = sessions_->Lease(session.session_id, region->region_id);
  ASSERT_TRUE(lease.ok()) << lease.status();
  EXPECT_EQ(lease->region().data()[77], std::byte{77});
}

TEST_F(SideSocketTest, HangUpEndsTheSession) {
  StartServer();
  const SessionInfo session = Open('a');
  Bind(session)->HangUp();
  EXPECT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kHangUp);
}

TEST_F(SideSocketTest, WrongTokenIsDeniedAndClosed) {
  StartServer();
  Open('a');
  RawSideSocketClient client(options_.path);
  ASSERT_TRUE(client.SendHello(SideSocketToken{}));
  const auto reply = client.Receive();
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->code, kDenied);
  EXPECT_FALSE(client.Receive().has_value());
}

TEST_F(SideSocketTest, ReusedTokenIsDeniedAndTheFirstConnectionStays) {
  StartServer();
  const SessionInfo session = Open('a');
  const auto first = Bind(session);
  RawSideSocketClient second(options_.path);
  ASSERT_TRUE(second.SendHello(session.token));
  const auto reply = second.Receive();
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->code, kDenied);
  EXPECT_FALSE(second.Receive().has_value());
  const UniqueFd memory = NewMemfd("k", PageBytes());
  ASSERT_TRUE(first->SendFds({memory.get()}));
  EXPECT_EQ(first->Receive()->code, kOk);
}

TEST_F(SideSocketTest, ConnectionWithoutAHelloIsClosedInTime) {
  options_.hello_timeout = absl::Milliseconds(30);
  StartServer();
  RawSideSocketClient client(options_.path);
  ASSERT_TRUE(client.connected());
  EXPECT_FALSE(client.Receive().has_value());
}

TEST_F(SideSocketTest, HelloDeadlineSparesBoundConnections) {
  options_.hello_timeout = absl::Milliseconds(30);
  StartServer();
  const auto bound = Bind(Open('a'));
  RawSideSocketClient silent(options_.path);
  EXPECT_FALSE(silent.Receive().has_value());  // By now the deadline of both has passed.
  const UniqueFd memory = NewMemfd("k", PageBytes());
  ASSERT_TRUE(bound->SendFds({memory.get()}));
  EXPECT_EQ(bound->Receive()->code, kOk);
}

TEST_F(SideSocketTest, ShortFrameCloses) {
  StartServer();
  const SessionInfo session = Open('a');
  const auto client = Bind(session);
  const wire::SideSocketRequest request;
  ASSERT_TRUE(client->Send(&request, sizeof(request) - 1));
  ExpectClosedWithoutHarm(*client, session);
}

TEST_F(SideSocketTest, LongFrameCloses) {
  StartServer();
  const SessionInfo session = Open('a');
  const auto client = Bind(session);
  const std::string frame(4096, '\0');
  ASSERT_TRUE(client->Send(frame.data(), frame.size()));
  ExpectClosedWithoutHarm(*client, session);
}

TEST_F(SideSocketTest, WrongMagicCloses) {
  StartServer();
  const SessionInfo session = Open('a');
  const auto client = Bind(session);
  wire::SideSocketRequest request;
  request.type = wire::SideSocketFrameType::kPassFd;
  request.magic ^= 1;
  const UniqueFd memory = NewMemfd("k", PageBytes());
  ASSERT_TRUE(client->Send(&request, sizeof(request), {memory.get()}));
  ExpectClosedWithoutHarm(*client, session);
}

TEST_F(SideSocketTest, FrameWithoutADescriptorCloses) {
  StartServer();
  const SessionInfo session = Open('a');
  const auto client = Bind(session);
  ASSERT_TRUE(client->SendFds({}));
  ExpectClosedWithoutHarm(*client, session);
}

TEST_F(SideSocketTest, FrameWithTwoDescriptorsClosesBoth) {
  StartServer();
  const SessionInfo session = Open('a');
  const auto client = Bind(session);
  const UniqueFd memory = NewMemfd("k", PageBytes());
  const int64_t before = testing::CountOpenFds();
  ASSERT_TRUE(client->SendFds({memory.get(), memory.get()}));
  EXPECT_EQ(client->Receive()->code, kInvalid);
  EXPECT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kHangUp);
  EXPECT_FALSE(client->Receive().has_value());
  // The server's end of the connection and the peer's pidfd, if any, are gone as well.
  EXPECT_LT(testing::CountOpenFds(), before);
}

TEST_F(SideSocketTest, FrameWithMoreDescriptorsThanTheBufferHoldsCloses) {
  StartServer();
  const SessionInfo session = Open('a');
  const auto client = Bind(session);
  const UniqueFd m = NewMemfd("k", PageBytes());
  const int f = m.get();
  ASSERT_TRUE(client->SendFds({f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f}));
  ExpectClosedWithoutHarm(*client, session);
}

TEST_F(SideSocketTest, HelloWithADescriptorCloses) {
  StartServer();
  const SessionInfo session = Open('a');
  RawSideSocketClient client(options_.path);
  const UniqueFd memory = NewMemfd("k", PageBytes());
  ASSERT_TRUE(client.SendHello(session.token, {memory.get()}));
  EXPECT_EQ(client.Receive()->code, kInvalid);
  EXPECT_FALSE(client.Receive().has_value());
  Bind(session);  // The token was not spent.
}

TEST_F(SideSocketTest, DescriptorBeforeHelloCloses) {
  StartServer();
  RawSideSocketClient client(options_.path);
  const UniqueFd memory = NewMemfd("k", PageBytes());
  ASSERT_TRUE(client.SendFds({memory.get()}));
  EXPECT_EQ(client.Receive()->code, kInvalid);
  EXPECT_FALSE(client.Receive().has_value());
}

TEST_F(SideSocketTest, TooManyPendingDescriptorsAreRefusedAndTheConnectionStays) {
  StartServer();
  const auto client = Bind(Open('a'));
  const UniqueFd memory = NewMemfd("k", PageBytes());
  int32_t code = kOk;
  int taken = -1;
  while (code == kOk && taken < 1000) {
    ++taken;
    ASSERT_TRUE(client->SendFds({memory.get()}));
    const auto reply = client->Receive();
    ASSERT_TRUE(reply.has_value());
    code = reply->code;
  }
  EXPECT_EQ(code, kExhausted);
  EXPECT_EQ(taken, 64);
  ASSERT_TRUE(client->SendFds({memory.get()}));
  EXPECT_EQ(client->Receive()->code, kExhausted);
}

TEST_F(SideSocketTest, DescriptorForAClosedSessionIsNotFound) {
  StartServer();
  const SessionInfo session = Open('a');
  const auto client = Bind(session);
  ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
  const UniqueFd memory = NewMemfd("k", PageBytes());
  ASSERT_TRUE(client->SendFds({memory.get()}));
  EXPECT_EQ(client->Receive()->code, static_cast<int32_t>(absl::StatusCode::kNotFound));
  EXPECT_FALSE(client->Receive().has_value());
}

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

TEST_F(SideSocketTest, ConnectionBeyondTheLimitIsRefused) {
  options_.max_connections = 1;
  StartServer();
  const auto first = Bind(Open('a'));
  RawSideSocketClient second(options_.path);
  EXPECT_EQ(second.Receive()->code, kExhausted);
  EXPECT_FALSE(second.Receive().has_value());
}

TEST_F(SideSocketTest, ConnectionOfAnEndedSessionMakesRoom) {
  options_.max_connections = 1;
  StartServer();
  const SessionInfo session = Open('a');
  const auto first = Bind(session);
  ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
  Bind(Open('b'));
}

TEST_F(SideSocketTest, SocketFileHasTheModeAskedForAndGoesWithTheServer) {
  options_.mode = 0660;
  StartServer();
  struct stat info;
  ASSERT_EQ(::stat(options_.path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0660u);
  server_.reset();
  EXPECT_NE(::stat(options_.path.c_str(), &info), 0);
}

TEST_F(SideSocketTest, StaleSocketFileIsReplaced) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, options_.path.c_str(), sizeof(address.sun_path) - 1);
  {
    const UniqueFd dead(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    ASSERT_EQ(::bind(dead.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  StartServer();
  Bind(Open('a'));
}

TEST_F(SideSocketTest, LiveSocketIsNotReplaced) {
  StartServer();
  EXPECT_EQ(SideSocketServer::Start(options_, *sessions_).status().code(),
            absl::StatusCode::kAlreadyExists);
  Bind(Open('a'));
}

TEST_F(SideSocketTest, FileThatIsNoSocketIsNotReplaced) {
  const UniqueFd file(::open(options_.path.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
  EXPECT_EQ(SideSocketServer::Start(options_, *sessions_).status().code(),
            absl::StatusCode::kAlreadyExists);
  struct stat info;
  EXPECT_EQ(::stat(options_.path.c_str(), &info), 0);
}

TEST_F(SideSocketTest, PathLongerThanASocketAddressIsInvalid) {
  options_.path = directory_.File(std::string(200, 'p'));
  EXPECT_EQ(SideSocketServer::Start(options_, *sessions_).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(SideSocketTest, ServerThatGoesEndsTheSessionsItHolds) {
  StartServer();
  const SessionInfo session = Open('a');
  const auto client = Bind(session);
  server_.reset();
  EXPECT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kHangUp);
  EXPECT_FALSE(client->Receive().has_value());
}

TEST_F(SideSocketTest, CyclesLeakNoDescriptor) {
  StartServer();
  const auto cycle = [this](int i) {
    const SessionInfo session = Open(static_cast<char>(i));
    const auto client = Bind(session);
    const UniqueFd memory = NewMemfd("keepset-cycle", PageBytes());
    ASSERT_TRUE(client->SendFds({memory.get()}));
    const auto reply = client->Receive();
    ASSERT_TRUE(reply.has_value());
    ASSERT_TRUE(
        sessions_
            ->RegisterRegion(session.session_id, "kv", reply->fd_token, Whole("memfd", PageBytes()))
            .ok());
    if (i % 2 == 0) {
      ASSERT_TRUE(client->SendFds({memory.get(), memory.get()}));
    } else {
      client->HangUp();
    }
    ASSERT_EQ(observer_.AwaitEnd(session.session_id), SessionEnd::kHangUp);
  };
  cycle(0);
  server_.reset();
  const int64_t before = testing::CountOpenFds();
  StartServer();
  for (int i = 0; i < 200; ++i) cycle(i);
  server_.reset();
  EXPECT_EQ(testing::CountOpenFds(), before);
  EXPECT_FALSE(IsMapped("memfd:keepset-cycle"));
}

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

// UBSan's vptr check probes memory through a pipe: with a full descriptor table it reports sound
// objects. Builds without it run these tests.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kVptrIsChecked = true;
#else
constexpr bool kVptrIsChecked = false;
#endif

TEST_F(SideSocketTest, DescriptorThatFindsNoRoomIsResourceExhausted) {
  if (kVptrIsChecked) GTEST_SKIP() << "UBSan's vptr check needs free descriptors";
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

TEST_F(SideSocketTest, ConnectionThatFindsNoRoomIsTurnedAway) {
  if (kVptrIsChecked) GTEST_SKIP() << "UBSan's vptr check needs free descriptors";
  StartServer();
  UniqueFd waiting(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, options_.path.c_str(), sizeof(address.sun_path) - 1);
  {
    std::vector<UniqueFd> fillers;
    const ScopedNofile limit(FillDescriptorTable(fillers));
    ASSERT_EQ(::connect(waiting.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    wire::SideSocketReply received;
    ASSERT_EQ(::recv(waiting.get(), &received, sizeof(received), 0),
              static_cast<ssize_t>(sizeof(received)));
    EXPECT_EQ(received.code, kExhausted);
  }
  Bind(Open('b'));
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
