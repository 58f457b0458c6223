/* Frames of the side socket (AF_UNIX, SOCK_SEQPACKET), which carries file descriptors to keepsetd.
 *
 * The client connects to OpenSessionResponse.side_socket_path, sends kHello with its one-time token
 * and keeps the connection for the life of the session: its hang-up ends the session. Then each
 * kPassFd frame carries exactly one descriptor (SCM_RIGHTS) and is answered with an fd token, which
 * RegisterRegion names. Fixed-size, little-endian, no strings.
 */
#ifndef KEEPSET_PROTO_SIDE_SOCKET_WIRE_H_
#define KEEPSET_PROTO_SIDE_SOCKET_WIRE_H_

#include <cstdint>

namespace keepset::wire {

inline constexpr uint32_t kSideSocketMagic = 0x3153504b;  // "KPS1"
inline constexpr uint32_t kSideSocketTokenBytes = 32;

enum class SideSocketFrameType : uint32_t { kHello = 1, kPassFd = 2 };

struct SideSocketRequest {
  uint32_t magic = kSideSocketMagic;
  SideSocketFrameType type = SideSocketFrameType::kHello;
  uint8_t token[kSideSocketTokenBytes] = {};  // kHello: the one-time token; kPassFd: zero
  uint8_t reserved[24] = {};                  // zero
};
static_assert(sizeof(SideSocketRequest) == 64);

struct SideSocketReply {
  uint32_t magic = kSideSocketMagic;
  int32_t code = 0;       // canonical status code, 0 = OK
  uint64_t fd_token = 0;  // kPassFd
  uint8_t reserved[16] = {};
};
static_assert(sizeof(SideSocketReply) == 32);

}  // namespace keepset::wire

#endif  // KEEPSET_PROTO_SIDE_SOCKET_WIRE_H_
