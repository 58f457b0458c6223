// The CUDA driver as an engine uses it: allocations of both kinds that can be shared, and the count
// of free memory. Resolved at run time.
#ifndef KEEPSET_TESTS_GPU_IPC_DRIVER_H_
#define KEEPSET_TESTS_GPU_IPC_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "base/cuda_abi.h"

namespace keepset::gpu {

// How memory is allocated, by the name of the transport that shares it.
inline constexpr char kByIpc[] = "cuda_ipc";  // cuMemAlloc
inline constexpr char kByVmm[] = "cuda_vmm";  // cuMemCreate with a POSIX descriptor, and cuMemMap

// On the thread that opened it, where device 0 is current from then on. Memory that is not freed
// goes with the process.
class Driver {
 public:
  // Empty, or why there is no device.
  std::string Open();

  // By the driver's own count; -1 when it fails.
  int64_t FreeBytes() const;
  // Zeros, written when this returns. `bytes`: of kByVmm a multiple of 2 MiB. Null when there is no
  // memory.
  std::byte* Allocate(const std::string& kind, int64_t bytes);
  bool Free(std::byte* memory);
  // Of memory by kByIpc: the driver's own answers, where exporters refuse.
  struct RawHandle {
    std::string bytes;  // empty when the driver refuses
    uint64_t allocation_bytes = 0;
    uint64_t generation = 0;
  };
  RawHandle HandleOf(const std::byte* memory) const;
  // Between device memory and memory of this process; done when they return.
  bool Write(std::byte* to, const void* from, int64_t bytes) const;
  bool Read(void* to, const std::byte* from, int64_t bytes) const;

 private:
  bool AllocateVmm(size_t bytes, cuda_abi::DevicePointer* pointer) const;

  std::map<std::byte*, size_t> mapped_;  // of kByVmm

  cuda_abi::Result (*allocate_)(cuda_abi::DevicePointer*, size_t) = nullptr;
  cuda_abi::Result (*free_)(cuda_abi::DevicePointer) = nullptr;
  cuda_abi::Result (*info_)(size_t*, size_t*) = nullptr;
  cuda_abi::Result (*write_)(cuda_abi::DevicePointer, const void*, size_t) = nullptr;
  cuda_abi::Result (*read_)(void*, cuda_abi::DevicePointer, size_t) = nullptr;
  cuda_abi::Result (*ipc_get_)(cuda_abi::IpcHandle*, cuda_abi::DevicePointer) = nullptr;
  cuda_abi::Result (*range_)(cuda_abi::DevicePointer*, size_t*, cuda_abi::DevicePointer) = nullptr;
  cuda_abi::Result (*attribute_)(void*, int, cuda_abi::DevicePointer) = nullptr;
  // Null in a driver of host memory, which is zero.
  cuda_abi::Result (*set_)(cuda_abi::DevicePointer, unsigned char, size_t) = nullptr;
  cuda_abi::Result (*synchronize_)() = nullptr;
  cuda_abi::Result (*create_)(cuda_abi::AllocationHandle*, size_t, const void*,
                              unsigned long long) = nullptr;
  cuda_abi::Result (*release_)(cuda_abi::AllocationHandle) = nullptr;
  cuda_abi::Result (*reserve_)(cuda_abi::DevicePointer*, size_t, size_t, cuda_abi::DevicePointer,
                               unsigned long long) = nullptr;
  cuda_abi::Result (*give_back_)(cuda_abi::DevicePointer, size_t) = nullptr;
  cuda_abi::Result (*map_)(cuda_abi::DevicePointer, size_t, size_t, cuda_abi::AllocationHandle,
                           unsigned long long) = nullptr;
  cuda_abi::Result (*unmap_)(cuda_abi::DevicePointer, size_t) = nullptr;
  cuda_abi::Result (*set_access_)(cuda_abi::DevicePointer, size_t,
                                  const cuda_abi::AccessDescriptor*, size_t) = nullptr;
};

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_IPC_DRIVER_H_
