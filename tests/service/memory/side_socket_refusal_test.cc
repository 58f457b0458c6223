// Frames and descriptors that the side socket refuses, without harm to other connections.
#include <cstdint>
#include <string>

#include "gtest/gtest.h"
#include "proto/side_socket_wire.h"
#include "tests/service/memory/memory_test_support.h"
#include "tests/service/memory/side_socket_fixture.h"

namespace keepset::service {
namespace {

using testing::kExhausted;
using testing::kInvalid;
using testing::kOk;
using testing::NewMemfd;
using testing::PageBytes;
using testing::RawSideSocketClient;
using testing::SideSocketTest;

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

}  // namespace
}  // namespace keepset::service
