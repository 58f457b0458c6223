// Maps a part of a file descriptor into this process: what the transports of host memory share.
//
// The mapping keeps its descriptor, so that Verify can look at the object again. Thread-safe.
#ifndef KEEPSET_SERVICE_MEMORY_HOST_MAPPING_H_
#define KEEPSET_SERVICE_MEMORY_HOST_MAPPING_H_

#include <memory>

#include "absl/status/statusor.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {

enum class SealPolicy {
  kNone,            // an object that cannot be sealed
  kShrinkRequired,  // F_SEAL_SHRINK must be there: a mapping never loses its pages
};

// Maps `length` bytes at `offset` of descriptor.fd.
//
// InvalidArgument: no memory object of ordinary pages, not sealed as asked, size other than
// allocation_bytes, offset + length beyond it, offset not page-aligned, length 0, a device named,
// read-write asked of a read-only object. ResourceExhausted: no address space left.
absl::StatusOr<std::unique_ptr<MappedRegion>> MapHostMemory(RegionDescriptor descriptor,
                                                            SealPolicy seals);

// What a failed open or accept tells the caller: ResourceExhausted naming RLIMIT_NOFILE when this
// process is out of descriptors.
absl::Status DescriptorError(int error, absl::string_view what);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_HOST_MAPPING_H_
