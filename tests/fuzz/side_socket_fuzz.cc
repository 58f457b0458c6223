// Frames of the side socket: whatever a peer sends is refused or is exactly one frame.
//
// Input: byte 0 the number of descriptors that came along, byte 1 the phase, the rest the frame.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "absl/types/span.h"
#include "base/check.h"
#include "service/memory/side_socket_frame.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using keepset::service::SideSocketPhase;
  using keepset::wire::SideSocketFrameType;
  using keepset::wire::SideSocketRequest;

  if (size < 2) return 0;
  const int num_fds = data[0] % 4;
  const SideSocketPhase phase =
      data[1] % 2 == 0 ? SideSocketPhase::kAwaitingHello : SideSocketPhase::kBound;
  const absl::Span<const uint8_t> bytes = absl::MakeConstSpan(data + 2, size - 2);
  const auto frame = keepset::service::ParseSideSocketFrame(bytes, num_fds, phase);
  if (!frame.ok()) {
    KEEPSET_CHECK(frame.status().code() == absl::StatusCode::kInvalidArgument);
    return 0;
  }
  // An accepted frame is the only one with its content: written anew, it is the same bytes.
  SideSocketRequest again;
  again.type = frame->type;
  std::memcpy(again.token, frame->token.data(), sizeof(again.token));
  again.fd_token = frame->fd_token;
  KEEPSET_CHECK(bytes.size() == sizeof(again));
  KEEPSET_CHECK(std::memcmp(bytes.data(), &again, sizeof(again)) == 0);
  const bool is_hello = frame->type == SideSocketFrameType::kHello;
  KEEPSET_CHECK(num_fds == (frame->type == SideSocketFrameType::kPassFd ? 1 : 0));
  KEEPSET_CHECK((frame->fd_token != 0) == (frame->type == SideSocketFrameType::kFetchFd));
  KEEPSET_CHECK(phase == (is_hello ? SideSocketPhase::kAwaitingHello : SideSocketPhase::kBound));
  return 0;
}
