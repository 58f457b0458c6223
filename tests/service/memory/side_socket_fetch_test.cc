// Descriptors of the server's own memory over the side socket.
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "gtest/gtest.h"
#include "tests/service/memory/memory_test_support.h"
#include "tests/service/memory/side_socket_fixture.h"

namespace keepset::service {
namespace {

using testing::kOk;
using testing::PageBytes;
using testing::SideSocketTest;

constexpr int kNotFound = 5;

class SideSocketFetch : public SideSocketTest {
 protected:
  uint64_t Allocate(const SessionInfo& session) {
    const auto region =
        sessions_->AllocateRegion(session.session_id, "out", "memfd", PageBytes(), "");
    EXPECT_TRUE(region.ok()) << region.status();
    region_id_ = region.ok() ? region->info.region_id : "";
    return region.ok() ? region->fd_token : 0;
  }
  std::string region_id_;
};

TEST_F(SideSocketFetch, ADescriptorComesBackWithItsToken) {
  StartServer();
  const SessionInfo session = Open('a');
  const auto client = Bind(session);
  const uint64_t token = Allocate(session);
  ASSERT_TRUE(client->SendFetch(token));
  UniqueFd fd;
  const auto reply = client->Receive(&fd);
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->code, kOk);
  EXPECT_EQ(reply->fd_token, token);
  ASSERT_TRUE(fd.valid());
  void* const data = ::mmap(nullptr, PageBytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  ASSERT_NE(data, MAP_FAILED);
  static_cast<std::byte*>(data)[3] = std::byte{9};
  const auto lease = sessions_->Lease(session.session_id, region_id_);
  ASSERT_TRUE(lease.ok()) << lease.status();
  EXPECT_EQ(lease->region().data()[3], std::byte{9});
  ::munmap(data, PageBytes());
}

TEST_F(SideSocketFetch, ASecondFetchIsRefusedAndTheConnectionStays) {
  StartServer();
  const SessionInfo session = Open('a');
  const auto client = Bind(session);
  const uint64_t token = Allocate(session);
  ASSERT_TRUE(client->SendFetch(token));
  EXPECT_EQ(client->Receive()->code, kOk);
  ASSERT_TRUE(client->SendFetch(token));
  UniqueFd fd;
  const auto reply = client->Receive(&fd);
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->code, kNotFound);
  EXPECT_FALSE(fd.valid());
  EXPECT_TRUE(sessions_->CheckSession(session.session_id).ok());
}

TEST_F(SideSocketFetch, AnotherSessionsConnectionDoesNotGetIt) {
  StartServer();
  const SessionInfo mine = Open('a');
  const auto owner = Bind(mine);
  const auto thief = Bind(Open('b'));
  const uint64_t token = Allocate(mine);
  ASSERT_TRUE(thief->SendFetch(token));
  UniqueFd fd;
  EXPECT_EQ(thief->Receive(&fd)->code, kNotFound);
  EXPECT_FALSE(fd.valid());
  ASSERT_TRUE(owner->SendFetch(token));
  EXPECT_EQ(owner->Receive()->code, kOk);
}

TEST_F(SideSocketFetch, AFetchOfAnEndedSessionEndsTheConnection) {
  StartServer();
  const SessionInfo session = Open('a');
  const auto client = Bind(session);
  const uint64_t token = Allocate(session);
  ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
  ASSERT_TRUE(client->SendFetch(token));
  UniqueFd fd;
  const auto reply = client->Receive(&fd);
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->code, kNotFound);
  EXPECT_FALSE(fd.valid());
  EXPECT_FALSE(client->Receive().has_value());
}

TEST_F(SideSocketFetch, AFetchBeforeTheHelloEndsTheConnection) {
  StartServer();
  const uint64_t token = Allocate(Open('a'));
  testing::RawSideSocketClient client(options_.path);
  ASSERT_TRUE(client.SendFetch(token));
  EXPECT_NE(client.Receive()->code, kOk);
  EXPECT_FALSE(client.Receive().has_value());
}

}  // namespace
}  // namespace keepset::service
