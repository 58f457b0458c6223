#include "service/memory/side_socket_frame.h"

#include <cstring>
#include <vector>

#include "gtest/gtest.h"

namespace keepset::service {
namespace {

using wire::SideSocketFrameType;
using wire::SideSocketRequest;

absl::StatusOr<SideSocketFrame> Parse(const SideSocketRequest& request, int num_fds,
                                      SideSocketPhase phase) {
  uint8_t bytes[sizeof(request)];
  std::memcpy(bytes, &request, sizeof(request));
  return ParseSideSocketFrame(bytes, num_fds, phase);
}

SideSocketRequest PassFd() {
  SideSocketRequest request;
  request.type = SideSocketFrameType::kPassFd;
  return request;
}

SideSocketRequest FetchFd(uint64_t fd_token) {
  SideSocketRequest request;
  request.type = SideSocketFrameType::kFetchFd;
  request.fd_token = fd_token;
  return request;
}

TEST(SideSocketFrame, FetchFdCarriesItsToken) {
  const auto frame = Parse(FetchFd(0x0123456789abcdef), 0, SideSocketPhase::kBound);
  ASSERT_TRUE(frame.ok()) << frame.status();
  EXPECT_EQ(frame->type, SideSocketFrameType::kFetchFd);
  EXPECT_EQ(frame->fd_token, 0x0123456789abcdefu);
}

TEST(SideSocketFrame, FetchFdWantsNoDescriptorAndAHelloBefore) {
  EXPECT_FALSE(Parse(FetchFd(1), 1, SideSocketPhase::kBound).ok());
  EXPECT_FALSE(Parse(FetchFd(1), 0, SideSocketPhase::kAwaitingHello).ok());
}

TEST(SideSocketFrame, FetchFdWithoutAnFdTokenIsRefused) {
  EXPECT_FALSE(Parse(FetchFd(0), 0, SideSocketPhase::kBound).ok());
}

TEST(SideSocketFrame, FetchFdWithASessionTokenIsRefused) {
  SideSocketRequest request = FetchFd(1);
  request.token[31] = 1;
  EXPECT_FALSE(Parse(request, 0, SideSocketPhase::kBound).ok());
}

TEST(SideSocketFrame, OnlyAFetchNamesAnFdToken) {
  SideSocketRequest request = PassFd();
  request.fd_token = 1;
  EXPECT_FALSE(Parse(request, 1, SideSocketPhase::kBound).ok());
  SideSocketRequest hello;
  hello.fd_token = 1;
  EXPECT_FALSE(Parse(hello, 0, SideSocketPhase::kAwaitingHello).ok());
}

TEST(SideSocketFrame, HelloCarriesItsToken) {
  SideSocketRequest request;
  for (int i = 0; i < 32; ++i) request.token[i] = static_cast<uint8_t>(i + 1);
  const auto frame = Parse(request, 0, SideSocketPhase::kAwaitingHello);
  ASSERT_TRUE(frame.ok()) << frame.status();
  EXPECT_EQ(frame->type, SideSocketFrameType::kHello);
  EXPECT_EQ(frame->token[31], 32);
}

TEST(SideSocketFrame, PassFdWantsExactlyOneDescriptor) {
  EXPECT_FALSE(Parse(PassFd(), 0, SideSocketPhase::kBound).ok());
  EXPECT_TRUE(Parse(PassFd(), 1, SideSocketPhase::kBound).ok());
  EXPECT_FALSE(Parse(PassFd(), 2, SideSocketPhase::kBound).ok());
}

TEST(SideSocketFrame, PhasesAcceptTheirOwnFrameOnly) {
  EXPECT_FALSE(Parse(PassFd(), 1, SideSocketPhase::kAwaitingHello).ok());
  EXPECT_FALSE(Parse(SideSocketRequest(), 0, SideSocketPhase::kBound).ok());
}

TEST(SideSocketFrame, ReservedBytesMustBeZero) {
  SideSocketRequest request = PassFd();
  request.reserved[15] = 1;
  EXPECT_FALSE(Parse(request, 1, SideSocketPhase::kBound).ok());
}

TEST(SideSocketFrame, PassFdWithATokenIsRefused) {
  SideSocketRequest request = PassFd();
  request.token[0] = 1;
  EXPECT_FALSE(Parse(request, 1, SideSocketPhase::kBound).ok());
}

TEST(SideSocketFrame, UnknownTypeIsRefused) {
  SideSocketRequest request;
  request.type = static_cast<SideSocketFrameType>(4);
  const auto frame = Parse(request, 0, SideSocketPhase::kAwaitingHello);
  EXPECT_EQ(frame.status().message(),
            "frame type 4, want 1 (hello), 2 (pass descriptor) or 3 (fetch descriptor)");
}

TEST(SideSocketFrame, EverySizeButOneIsRefused) {
  const std::vector<uint8_t> bytes(sizeof(SideSocketRequest) + 1, 0);
  for (size_t size = 0; size <= bytes.size(); ++size) {
    EXPECT_EQ(ParseSideSocketFrame(absl::MakeConstSpan(bytes).first(size), 0,
                                   SideSocketPhase::kAwaitingHello)
                  .status()
                  .code(),
              absl::StatusCode::kInvalidArgument)
        << size;
  }
}

}  // namespace
}  // namespace keepset::service
