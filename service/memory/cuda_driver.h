// The CUDA driver as the memory transports need it, resolved from libcuda at run time: nothing
// links it, and a host without a driver runs the same binary.
//
// Thread-safe. Every call works in the primary context of its device, whatever thread it is on; a
// device that no call named has none.
#ifndef KEEPSET_SERVICE_MEMORY_CUDA_DRIVER_H_
#define KEEPSET_SERVICE_MEMORY_CUDA_DRIVER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {

inline constexpr char kLibcuda[] = "libcuda.so.1";
// Bytes of a legacy IPC handle.
inline constexpr size_t kIpcHandleBytes = 64;

struct CudaDevice {
  int ordinal = 0;   // as this process sees it
  std::string uuid;  // "GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"
  std::string name;
  std::string sharing_note;  // what is special about sharing its memory (MIG, MPS); mostly empty
  // Why the driver maps no memory of it that way, by its own word; mostly empty.
  std::string ipc_obstacle;
  std::string vmm_obstacle;
};

// A mapped range of device memory.
struct DeviceRange {
  uint64_t base = 0;
  uint64_t bytes = 0;
  uint64_t bytes_before = 0;  // of a mapping that begins before base
};

// Memory of this process, and what another one needs to map it.
struct ExportedIpc {
  DeviceRange range;
  std::string handle;  // kIpcHandleBytes
};
struct ExportedVmm {
  DeviceRange range;
  UniqueFd fd;
};

// The contexts of devices cost memory: each is made with the first mapping on its device.
class CudaDriver {
 public:
  // NotFound: no such library. FailedPrecondition: it has no device, or lacks an entry point.
  static absl::StatusOr<std::shared_ptr<CudaDriver>> Load(const std::string& library = kLibcuda);
  virtual ~CudaDriver() = default;

  virtual const std::vector<CudaDevice>& devices() const = 0;

  // Maps the whole allocation behind a legacy IPC handle of kIpcHandleBytes and asks the driver for
  // the extent of what it mapped: the allocation, or the block of memory that it was made in and
  // that the handle shares whole (CUDA C++ Programming Guide, "Interprocess Communication"). The
  // driver has one mapping per allocation and process: opening one that is open answers the same
  // address, and one close unmaps it for everybody (ipc_allocations.h counts).
  //
  // InvalidArgument: the handle is of freed memory, of another device or not of this kind.
  // FailedPrecondition: exporter and this process have the same process id, the devices are no
  // peers, or the host's setup forbids it. ResourceExhausted: no memory, address space, peer or MPS
  // client left. Unavailable: a service of the host does not run. Internal: the device is faulty.
  virtual absl::StatusOr<DeviceRange> OpenIpc(int device, absl::string_view handle) = 0;
  virtual absl::Status CloseIpc(int device, uint64_t base) = 0;

  // Maps `bytes` of the VMM allocation behind a POSIX descriptor, which stays the caller's.
  // Errors as OpenIpc.
  virtual absl::StatusOr<DeviceRange> MapVmm(int device, int fd, uint64_t bytes,
                                             RegionAccess access) = 0;
  virtual absl::Status UnmapVmm(int device, const DeviceRange& range) = 0;

  // Fresh memory of this process for others to map, `bytes` (a multiple of
  // cuda_abi::kAllocationGranularity) of zeros, written when this returns. ResourceExhausted: the
  // device has none left. Otherwise as OpenIpc.
  virtual absl::StatusOr<ExportedIpc> AllocateIpc(int device, uint64_t bytes) = 0;
  virtual absl::Status FreeIpc(int device, uint64_t base) = 0;
  // UnmapVmm frees it.
  virtual absl::StatusOr<ExportedVmm> AllocateVmm(int device, uint64_t bytes) = 0;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_CUDA_DRIVER_H_
