// The side socket: tokens, connections, its file.
#include "service/memory/side_socket.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cstdint>
#include <cstring>
#include <string>

#include "gtest/gtest.h"
#include "tests/service/memory/memory_test_support.h"
#include "tests/service/memory/side_socket_fixture.h"

namespace keepset::service {
namespace {

using testing::IsMapped;
using testing::kDenied;
using testing::kExhausted;
using testing::kOk;
using testing::NewMemfd;
using testing::PageBytes;
using testing::RawSideSocketClient;
using testing::SideSocketTest;
using testing::Whole;

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
            absl::StatusCode::kFailedPrecondition);
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

}  // namespace
}  // namespace keepset::service
