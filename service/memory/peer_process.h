// The process at the other end of a Unix socket, to be watched.
#ifndef KEEPSET_SERVICE_MEMORY_PEER_PROCESS_H_
#define KEEPSET_SERVICE_MEMORY_PEER_PROCESS_H_

#include <sys/types.h>

#include "absl/status/statusor.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {

// How a pidfd of the peer is come by.
enum class PeerLookup {
  kBySocket,  // the kernel's own reference (SO_PEERPIDFD, Linux 6.5), by its number where it has
              // none
  kByNumber,
};

// pidfd of the process that connected the accepted `socket`, never of another one that has its
// number by now; invalid where the kernel or a namespace hides it, or, in older kernels, where it
// has ended.
// `number`: SO_PEERCRED's. ResourceExhausted: no descriptor or memory left for it.
absl::StatusOr<UniqueFd> PeerProcess(int socket, pid_t number,
                                     PeerLookup lookup = PeerLookup::kBySocket);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_PEER_PROCESS_H_
