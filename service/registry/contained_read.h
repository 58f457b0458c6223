// Reads a file that a peer named, from inside one directory and nowhere else.
#ifndef KEEPSET_SERVICE_REGISTRY_CONTAINED_READ_H_
#define KEEPSET_SERVICE_REGISTRY_CONTAINED_READ_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace keepset::service {

// The bytes of the regular file `path`, relative to `directory`. The kernel resolves it beneath
// the directory: neither "..", nor an absolute path, nor a link leads out. InvalidArgument: it
// would, or is no regular file. NotFound, PermissionDenied. ResourceExhausted: more than
// `max_bytes`. Aborted: changed while it was read. Unimplemented: the kernel has no openat2.
absl::StatusOr<std::string> ReadContained(const std::string& directory, const std::string& path,
                                          int64_t max_bytes);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_CONTAINED_READ_H_
