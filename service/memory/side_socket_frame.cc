#include "service/memory/side_socket_frame.h"

#include <algorithm>
#include <cstddef>

#include "absl/strings/str_cat.h"

namespace keepset::service {
namespace {

using wire::SideSocketFrameType;
using wire::SideSocketRequest;

uint32_t ReadLittleEndian32(absl::Span<const uint8_t> bytes, size_t at) {
  return uint32_t{bytes[at]} | uint32_t{bytes[at + 1]} << 8 | uint32_t{bytes[at + 2]} << 16 |
         uint32_t{bytes[at + 3]} << 24;
}

uint64_t ReadLittleEndian64(absl::Span<const uint8_t> bytes, size_t at) {
  return uint64_t{ReadLittleEndian32(bytes, at)} |
         uint64_t{ReadLittleEndian32(bytes, at + sizeof(uint32_t))} << 32;
}

bool AllZero(absl::Span<const uint8_t> bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](uint8_t byte) { return byte == 0; });
}

}  // namespace

absl::StatusOr<SideSocketFrame> ParseSideSocketFrame(absl::Span<const uint8_t> bytes, int num_fds,
                                                     SideSocketPhase phase) {
  if (bytes.size() != sizeof(SideSocketRequest)) {
    return absl::InvalidArgumentError(
        absl::StrCat("frame of ", bytes.size(), " bytes, want ", sizeof(SideSocketRequest)));
  }
  if (ReadLittleEndian32(bytes, offsetof(SideSocketRequest, magic)) != wire::kSideSocketMagic) {
    return absl::InvalidArgumentError("frame without the magic \"KPS1\"");
  }
  if (!AllZero(bytes.subspan(offsetof(SideSocketRequest, reserved)))) {
    return absl::InvalidArgumentError("reserved bytes are set, want zero");
  }
  const absl::Span<const uint8_t> token =
      bytes.subspan(offsetof(SideSocketRequest, token), wire::kSideSocketTokenBytes);
  const uint32_t type = ReadLittleEndian32(bytes, offsetof(SideSocketRequest, type));
  const uint64_t fd_token = ReadLittleEndian64(bytes, offsetof(SideSocketRequest, fd_token));
  if (fd_token != 0 && type != static_cast<uint32_t>(SideSocketFrameType::kFetchFd)) {
    return absl::InvalidArgumentError("fd_token is set, want zero");
  }
  SideSocketFrame frame;
  switch (type) {
    case static_cast<uint32_t>(SideSocketFrameType::kHello):
      if (phase != SideSocketPhase::kAwaitingHello) {
        return absl::InvalidArgumentError("second hello on one connection");
      }
      if (num_fds != 0) return absl::InvalidArgumentError("hello with a descriptor, want none");
      frame.type = SideSocketFrameType::kHello;
      std::copy(token.begin(), token.end(), frame.token.begin());
      return frame;
    case static_cast<uint32_t>(SideSocketFrameType::kPassFd):
      if (phase != SideSocketPhase::kBound) {
        return absl::InvalidArgumentError("descriptor before hello");
      }
      if (num_fds != 1) {
        return absl::InvalidArgumentError(
            absl::StrCat("frame with ", num_fds, " descriptors, want exactly 1"));
      }
      if (!AllZero(token)) return absl::InvalidArgumentError("token is set, want zero");
      frame.type = SideSocketFrameType::kPassFd;
      return frame;
    case static_cast<uint32_t>(SideSocketFrameType::kFetchFd):
      if (phase != SideSocketPhase::kBound) {
        return absl::InvalidArgumentError("fetch before hello");
      }
      if (num_fds != 0) return absl::InvalidArgumentError("fetch with a descriptor, want none");
      if (!AllZero(token)) return absl::InvalidArgumentError("token is set, want zero");
      if (fd_token == 0) return absl::InvalidArgumentError("fetch without an fd_token");
      frame.type = SideSocketFrameType::kFetchFd;
      frame.fd_token = fd_token;
      return frame;
    default:
      return absl::InvalidArgumentError(absl::StrCat(
          "frame type ", type, ", want 1 (hello), 2 (pass descriptor) or 3 (fetch descriptor)"));
  }
}

}  // namespace keepset::service
