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
  request.reserved[23] = 1;
  EXPECT_FALSE(Parse(request, 1, SideSocketPhase::kBound).ok());
}

TEST(SideSocketFrame, PassFdWithATokenIsRefused) {
  SideSocketRequest request = PassFd();
  request.token[0] = 1;
  EXPECT_FALSE(Parse(request, 1, SideSocketPhase::kBound).ok());
}

TEST(SideSocketFrame, UnknownTypeIsRefused) {
  SideSocketRequest request;
  request.type = static_cast<SideSocketFrameType>(3);
  const auto frame = Parse(request, 0, SideSocketPhase::kAwaitingHello);
  EXPECT_EQ(frame.status().message(), "frame type 3, want 1 (hello) or 2 (pass descriptor)");
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
