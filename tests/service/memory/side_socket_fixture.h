// A side socket in a temporary directory and the sessions behind it.
#ifndef KEEPSET_TESTS_SERVICE_MEMORY_SIDE_SOCKET_FIXTURE_H_
#define KEEPSET_TESTS_SERVICE_MEMORY_SIDE_SOCKET_FIXTURE_H_

#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "gtest/gtest.h"
#include "service/memory/session_manager.h"
#include "service/memory/side_socket.h"
#include "tests/fakes/fake_clock.h"
#include "tests/service/memory/memory_test_support.h"

namespace keepset::service::testing {

inline constexpr int32_t kOk = static_cast<int32_t>(absl::StatusCode::kOk);
inline constexpr int32_t kInvalid = static_cast<int32_t>(absl::StatusCode::kInvalidArgument);
inline constexpr int32_t kDenied = static_cast<int32_t>(absl::StatusCode::kPermissionDenied);
inline constexpr int32_t kExhausted = static_cast<int32_t>(absl::StatusCode::kResourceExhausted);

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

  TemporaryDirectory directory_;
  fakes::FakeClock clock_;
  RecordingObserver observer_;
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

}  // namespace keepset::service::testing

#endif  // KEEPSET_TESTS_SERVICE_MEMORY_SIDE_SOCKET_FIXTURE_H_
