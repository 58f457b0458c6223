// Reading one frame of the side socket (proto/side_socket_wire.h). Pure: no descriptors, no state.
#ifndef KEEPSET_SERVICE_MEMORY_SIDE_SOCKET_FRAME_H_
#define KEEPSET_SERVICE_MEMORY_SIDE_SOCKET_FRAME_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "proto/side_socket_wire.h"
#include "service/memory/session_manager.h"

namespace keepset::service {

enum class SideSocketPhase {
  kAwaitingHello,
  kBound,  // the token was redeemed
};

struct SideSocketFrame {
  wire::SideSocketFrameType type = wire::SideSocketFrameType::kHello;
  SideSocketToken token = {};  // kHello
  uint64_t fd_token = 0;       // kFetchFd
};

// InvalidArgument: not exactly one request frame, unknown type, reserved bytes set, a frame that
// does not belong in `phase`, or another number of descriptors than it carries (kPassFd 1, others
// 0).
absl::StatusOr<SideSocketFrame> ParseSideSocketFrame(absl::Span<const uint8_t> bytes, int num_fds,
                                                     SideSocketPhase phase);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_SIDE_SOCKET_FRAME_H_
