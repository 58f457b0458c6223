// Mapping memory that a server made: host memory by descriptor, device memory through the CUDA
// driver, which is resolved at run time.
#ifndef KEEPSET_CLIENTS_CPP_SERVICE_MAPPING_H_
#define KEEPSET_CLIENTS_CPP_SERVICE_MAPPING_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace keepset::client {

// What AllocateRegion answered.
struct MappingSource {
  std::string kind;        // "memfd", "cuda_ipc", "cuda_vmm"
  int fd = -1;             // memfd, cuda_vmm; stays the caller's
  std::string ipc_handle;  // cuda_ipc
  uint64_t allocation_bytes = 0;
  std::string device_uuid;
  std::string library;  // the driver of the cuda kinds
};

// Unmaps at destruction what Unmap has not. Not thread-safe, except for data().
class ServiceMapping {
 public:
  // NotFound: no driver here. FailedPrecondition: this process sees no such device.
  // InvalidArgument: a kind that is not mapped here. Otherwise what the kernel or the driver said.
  static absl::StatusOr<std::unique_ptr<ServiceMapping>> Open(const MappingSource& source);
  virtual ~ServiceMapping() = default;
  // Ends the mapping; nothing may use data() any more, whatever the answer. Once only. An error:
  // what the kernel or the driver said, and the memory may still be mapped.
  virtual absl::Status Unmap() = 0;
  // Read-write, of allocation_bytes; of a device unless the kind is memfd.
  virtual std::byte* data() const = 0;
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_SERVICE_MAPPING_H_
