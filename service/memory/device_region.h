// What both CUDA transports check before the driver is asked, and the region they answer.
#ifndef KEEPSET_SERVICE_MEMORY_DEVICE_REGION_H_
#define KEEPSET_SERVICE_MEMORY_DEVICE_REGION_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/memory/cuda_driver.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {

// Kernels load 16 bytes at a time.
inline constexpr uint64_t kDeviceAlignment = 16;

// InvalidArgument: length 0, offset + length beyond allocation_bytes (overflow included), offset
// not a multiple of kDeviceAlignment.
absl::Status CheckDeviceExtent(const RegionDescriptor& descriptor);
// The device of descriptor.device_uuid. InvalidArgument: none given. FailedPrecondition: not a
// device of this host, naming those there are.
absl::StatusOr<CudaDevice> FindDevice(const CudaDriver& driver, const RegionDescriptor& descriptor);
// Every device of the driver with its obstacle of that kind.
std::vector<DeviceSupport> ListSupport(const CudaDriver& driver, std::string CudaDevice::*obstacle);

// Of memory of our own: whole granules of the driver (cuda_abi::kAllocationGranularity).
uint64_t DeviceAllocationBytes(uint64_t length);
// Read-write, from the beginning of an allocation of that size.
RegionDescriptor OwnedDescriptor(uint64_t length, const std::string& device_uuid);

// FailedPrecondition with `instead`, unless the obstacle (of a CudaDevice) is empty.
absl::Status RefuseForObstacle(const CudaDevice& device, absl::string_view obstacle,
                               absl::string_view instead);

// `length` bytes at `offset` of a mapped allocation; `unmap` runs at destruction.
std::unique_ptr<MappedRegion> NewDeviceRegion(absl::string_view kind, const DeviceRange& range,
                                              const RegionDescriptor& descriptor,
                                              std::function<void()> unmap);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_DEVICE_REGION_H_
