/* Frames of the side socket (AF_UNIX, SOCK_SEQPACKET), which carries file descriptors to keepsetd
 * and back.
 *
 * The client connects to OpenSessionResponse.side_socket_path, sends kHello with its one-time token
 * and keeps the connection for the life of the session: its hang-up ends the session. Then each
 * kPassFd frame carries exactly one descriptor (SCM_RIGHTS) and is answered with an fd token, which
 * RegisterRegion names; each kFetchFd frame names a token of AllocateRegion and is answered with
 * that descriptor (SCM_RIGHTS of the reply), once. Fixed-size, little-endian, no strings.
 */
#ifndef KEEPSET_PROTO_SIDE_SOCKET_WIRE_H_
#define KEEPSET_PROTO_SIDE_SOCKET_WIRE_H_

#include <cstdint>

namespace keepset::wire {

inline constexpr uint32_t kSideSocketMagic = 0x3153504b;  // "KPS1"
inline constexpr uint32_t kSideSocketTokenBytes = 32;

enum class SideSocketFrameType : uint32_t { kHello = 1, kPassFd = 2, kFetchFd = 3 };

struct SideSocketRequest {
  uint32_t magic = kSideSocketMagic;
  SideSocketFrameType type = SideSocketFrameType::kHello;
  uint8_t token[kSideSocketTokenBytes] = {};  // kHello: the one-time token; otherwise zero
  uint64_t fd_token = 0;                      // kFetchFd: what to answer; otherwise zero
  uint8_t reserved[16] = {};                  // zero
};
static_assert(sizeof(SideSocketRequest) == 64);

struct SideSocketReply {
  uint32_t magic = kSideSocketMagic;
  int32_t code = 0;       // canonical status code, 0 = OK
  uint64_t fd_token = 0;  // kPassFd, kFetchFd
  uint8_t reserved[16] = {};
};
static_assert(sizeof(SideSocketReply) == 32);

}  // namespace keepset::wire

#endif  // KEEPSET_PROTO_SIDE_SOCKET_WIRE_H_
