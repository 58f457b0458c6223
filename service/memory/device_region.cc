#include "service/memory/device_region.h"

#include <bit>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/cuda_abi.h"

namespace keepset::service {
namespace {

// A client's text in a message.
constexpr size_t kMostEchoed = 64;

class DeviceRegion final : public MappedRegion {
 public:
  DeviceRegion(absl::string_view kind, const DeviceRange& range, const RegionDescriptor& descriptor,
               std::function<void()> unmap)
      : kind_(kind),
        data_(std::bit_cast<std::byte*>(range.base + descriptor.offset)),
        size_bytes_(static_cast<int64_t>(descriptor.length)),
        access_(descriptor.access),
        unmap_(std::move(unmap)) {}
  ~DeviceRegion() override { unmap_(); }

  absl::string_view kind() const override { return kind_; }
  MemorySpace space() const override { return MemorySpace::kDevice; }
  std::byte* data() const override { return data_; }
  int64_t size_bytes() const override { return size_bytes_; }
  RegionAccess access() const override { return access_; }
  // The mapping holds the memory; nobody can shrink it.
  absl::Status Verify() const override { return absl::OkStatus(); }

 private:
  const absl::string_view kind_;  // a transport's constant
  std::byte* const data_;
  const int64_t size_bytes_;
  const RegionAccess access_;
  const std::function<void()> unmap_;
};

}  // namespace

absl::Status CheckDeviceExtent(const RegionDescriptor& descriptor) {
  if (descriptor.length == 0) return absl::InvalidArgumentError("length=0, want 1 or more bytes");
  if (descriptor.offset > descriptor.allocation_bytes ||
      descriptor.length > descriptor.allocation_bytes - descriptor.offset) {
    return absl::InvalidArgumentError(
        absl::StrCat("offset=", descriptor.offset, " + length=", descriptor.length,
                     " is beyond allocation_bytes=", descriptor.allocation_bytes));
  }
  if (descriptor.offset % kDeviceAlignment != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "offset=", descriptor.offset, " in device memory, want a multiple of ", kDeviceAlignment));
  }
  return absl::OkStatus();
}

absl::StatusOr<CudaDevice> FindDevice(const CudaDriver& driver,
                                      const RegionDescriptor& descriptor) {
  const auto known = [&] {
    return absl::StrJoin(driver.devices(), ", ", [](std::string* out, const CudaDevice& device) {
      absl::StrAppend(out, device.uuid);
    });
  };
  if (descriptor.device_uuid.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("no device_uuid, want the device of the memory, one of: ", known()));
  }
  for (const CudaDevice& device : driver.devices()) {
    if (cuda_abi::IsSameDevice(device.uuid, descriptor.device_uuid)) return device;
  }
  std::string message = absl::StrCat(
      "device_uuid \"", absl::CHexEscape(descriptor.device_uuid.substr(0, kMostEchoed)),
      "\" is no device of this server, want one of: ", known());
  for (const CudaDevice& device : driver.devices()) {
    if (!device.sharing_note.empty()) absl::StrAppend(&message, "; ", device.sharing_note);
  }
  return absl::FailedPreconditionError(message);
}

std::vector<DeviceSupport> ListSupport(const CudaDriver& driver,
                                       std::string CudaDevice::*obstacle) {
  std::vector<DeviceSupport> listed;
  for (const CudaDevice& device : driver.devices()) {
    listed.push_back({device.uuid, device.name, device.*obstacle});
  }
  return listed;
}

uint64_t DeviceAllocationBytes(uint64_t length) {
  constexpr uint64_t kGranule = cuda_abi::kAllocationGranularity;
  return (length + kGranule - 1) / kGranule * kGranule;
}

RegionDescriptor OwnedDescriptor(uint64_t length, const std::string& device_uuid) {
  RegionDescriptor descriptor;
  descriptor.allocation_bytes = DeviceAllocationBytes(length);
  descriptor.length = length;
  descriptor.device_uuid = device_uuid;
  descriptor.access = RegionAccess::kReadWrite;
  return descriptor;
}

absl::Status RefuseForObstacle(const CudaDevice& device, absl::string_view obstacle,
                               absl::string_view instead) {
  if (obstacle.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("device ", device.uuid, " \"", device.name,
                                                    "\" cannot share memory this way: ", obstacle,
                                                    ", want ", instead));
}

std::unique_ptr<MappedRegion> NewDeviceRegion(absl::string_view kind, const DeviceRange& range,
                                              const RegionDescriptor& descriptor,
                                              std::function<void()> unmap) {
  return std::make_unique<DeviceRegion>(kind, range, descriptor, std::move(unmap));
}

}  // namespace keepset::service
