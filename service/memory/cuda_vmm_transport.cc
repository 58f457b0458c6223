// Device memory of the virtual memory management API by POSIX descriptor: what engines with
// expandable segments or a sleep mode allocate.
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "service/memory/cuda_transports.h"
#include "service/memory/device_region.h"

namespace keepset::service {
namespace {

constexpr absl::string_view kKind = "cuda_vmm";

class CudaVmmTransport final : public MemoryTransport {
 public:
  explicit CudaVmmTransport(CudaDriverSource source) : source_(std::move(source)) {}

  absl::string_view kind() const override { return kKind; }
  bool needs_fd() const override { return true; }
  uint64_t DeviceBytes() const override { return *mapped_bytes_; }

  std::vector<DeviceSupport> DevicesSupported() override {
    const absl::StatusOr<std::shared_ptr<CudaDriver>> driver = source_();
    if (!driver.ok()) return {};
    return ListSupport(**driver, &CudaDevice::vmm_obstacle);
  }

  absl::StatusOr<std::unique_ptr<MappedRegion>> Open(RegionDescriptor descriptor) override {
    KEEPSET_RETURN_IF_ERROR(CheckDeviceExtent(descriptor));
    KEEPSET_ASSIGN_OR_RETURN(const std::shared_ptr<CudaDriver> driver, source_());
    KEEPSET_ASSIGN_OR_RETURN(const CudaDevice found, FindDevice(*driver, descriptor));
    KEEPSET_RETURN_IF_ERROR(
        RefuseForObstacle(found, found.vmm_obstacle, "cuda_ipc, or memory of the host (memfd)"));
    const int device = found.ordinal;
    // The driver maps nothing but what the allocation holds, so its size needs no other check.
    KEEPSET_ASSIGN_OR_RETURN(const DeviceRange range,
                             driver->MapVmm(device, descriptor.fd.get(),
                                            descriptor.allocation_bytes, descriptor.access));
    *mapped_bytes_ += range.bytes;
    return NewDeviceRegion(kKind, range, descriptor,
                           [driver, device, range, mapped_bytes = mapped_bytes_] {
                             *mapped_bytes -= range.bytes;
                             // A driver that refuses has lost the mapping already (the device
                             // failed).
                             static_cast<void>(driver->UnmapVmm(device, range));
                           });
  }

  uint64_t AllocationBytes(uint64_t length) const override { return DeviceAllocationBytes(length); }

  absl::StatusOr<OwnedMemory> Create(uint64_t length, const std::string& device_uuid) override {
    const RegionDescriptor descriptor = OwnedDescriptor(length, device_uuid);
    KEEPSET_ASSIGN_OR_RETURN(const std::shared_ptr<CudaDriver> driver, source_());
    KEEPSET_ASSIGN_OR_RETURN(const CudaDevice found, FindDevice(*driver, descriptor));
    KEEPSET_RETURN_IF_ERROR(
        RefuseForObstacle(found, found.vmm_obstacle, "cuda_ipc, or memory of the host (memfd)"));
    const int device = found.ordinal;
    KEEPSET_ASSIGN_OR_RETURN(ExportedVmm exported,
                             driver->AllocateVmm(device, descriptor.allocation_bytes));
    OwnedMemory memory;
    memory.fd = std::move(exported.fd);
    memory.region = NewDeviceRegion(kKind, exported.range, descriptor,
                                    [driver, device, range = exported.range] {
                                      static_cast<void>(driver->UnmapVmm(device, range));
                                    });
    return memory;
  }

 private:
  const CudaDriverSource source_;
  // Regions outlive the transport.
  const std::shared_ptr<std::atomic<uint64_t>> mapped_bytes_ =
      std::make_shared<std::atomic<uint64_t>>(0);
};

}  // namespace

std::unique_ptr<MemoryTransport> NewCudaVmmTransport(CudaDriverSource driver) {
  return std::make_unique<CudaVmmTransport>(std::move(driver));
}

std::unique_ptr<MemoryTransport> NewBuiltinCudaVmmTransport() {
  return NewCudaVmmTransport(LoadOnce(kLibcuda));
}

}  // namespace keepset::service
