// Sharing this process's device memory with a server: what kind of allocation a pointer is in, and
// what another process needs to map it. The CUDA driver is resolved at run time, nothing links it.
#ifndef KEEPSET_CLIENTS_CPP_DEVICE_MEMORY_H_
#define KEEPSET_CLIENTS_CPP_DEVICE_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace keepset::client {

inline constexpr char kLibcuda[] = "libcuda.so.1";

// `size_bytes` of device memory from `data` on, ready to be registered. The memory stays the
// caller's, must outlive the registration, and what was written to it must be complete before a
// call names it: the streams that wrote it synchronised, and after a cudaMemcpy from pageable
// memory, which returns when the bytes are staged (CUDA Runtime API, "API synchronization
// behavior"), the default stream or the device. Immutable; thread-safe.
class DeviceRegion {
 public:
  // `data` is a device pointer of this process, aligned to 16 bytes; any pointer inside an
  // allocation will do. A plain allocation (cudaMalloc) is shared by legacy IPC, memory of the
  // virtual memory management API by a POSIX descriptor.
  //
  // NotFound: no driver here. InvalidArgument: no device memory, misaligned, or the bytes reach
  // beyond the allocation (expandable segments are many). FailedPrecondition: memory that its
  // allocator made impossible to share, or a plain allocation of less than 2 MiB, whose neighbours
  // legacy IPC would expose (CUDA C++ Programming Guide, "Interprocess Communication"); with what
  // to change.
  static absl::StatusOr<std::unique_ptr<DeviceRegion>> Export(
      void* data, int64_t size_bytes, const std::string& library = kLibcuda);
  ~DeviceRegion();
  DeviceRegion(const DeviceRegion&) = delete;
  DeviceRegion& operator=(const DeviceRegion&) = delete;

  std::byte* data() const { return data_; }
  int64_t size_bytes() const { return size_bytes_; }
  bool Contains(const void* data, int64_t size_bytes) const;

  const std::string& kind() const { return kind_; }              // "cuda_ipc", "cuda_vmm"
  const std::string& ipc_handle() const { return ipc_handle_; }  // cuda_ipc
  int fd() const { return fd_; }                                 // cuda_vmm, otherwise -1
  uint64_t allocation_bytes() const { return allocation_bytes_; }
  uint64_t offset() const { return offset_; }  // of data() in the allocation
  const std::string& device_uuid() const { return device_uuid_; }
  // The driver's number of the allocation: unique while this process lives.
  uint64_t generation() const { return generation_; }

 private:
  DeviceRegion() = default;

  std::byte* data_ = nullptr;
  int64_t size_bytes_ = 0;
  std::string kind_;
  std::string ipc_handle_;
  int fd_ = -1;
  uint64_t allocation_bytes_ = 0;
  uint64_t offset_ = 0;
  std::string device_uuid_;
  uint64_t generation_ = 0;
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_DEVICE_MEMORY_H_
