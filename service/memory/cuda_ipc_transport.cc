// Device memory by legacy CUDA IPC: works for cudaMalloc allocations, maps the whole allocation or
// the blocks it was made in.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/cuda_abi.h"
#include "base/status_macros.h"
#include "service/memory/cuda_transports.h"
#include "service/memory/device_region.h"
#include "service/memory/ipc_allocations.h"

namespace keepset::service {
namespace {

constexpr absl::string_view kKind = "cuda_ipc";

// That the driver mapped an allocation of the announced size, or of that size the blocks of
// kAllocationGranularity which a handle shares whole (CUDA C++ Programming Guide, "Interprocess
// Communication"). A small allocation has neighbours in its block, and where the driver answers the
// block itself nothing says which of them is meant.
absl::Status CheckAllocation(const DeviceRange& range, uint64_t announced) {
  const uint64_t mapped = range.bytes_before + range.bytes;
  if (range.bytes_before == 0 && mapped == announced) return absl::OkStatus();
  if (announced > range.bytes || mapped != DeviceAllocationBytes(announced)) {
    return absl::InvalidArgumentError(
        absl::StrCat("allocation_bytes=", announced, ", the driver says ", mapped));
  }
  if (announced < cuda_abi::kAllocationGranularity) {
    return absl::InvalidArgumentError(absl::StrCat(
        "allocation_bytes=", announced, ", the driver says ", mapped,
        ": it shares the whole block, with the neighbours of so small an allocation; make it part "
        "of one of at least ",
        cuda_abi::kAllocationGranularity, " bytes"));
  }
  return absl::OkStatus();
}

class CudaIpcTransport final : public MemoryTransport {
 public:
  explicit CudaIpcTransport(CudaDriverSource source) : source_(std::move(source)) {}

  absl::string_view kind() const override { return kKind; }
  bool needs_fd() const override { return false; }

  std::vector<DeviceSupport> DevicesSupported() override {
    const absl::StatusOr<std::shared_ptr<Opened>> opened = Driver();
    if (!opened.ok()) return {};
    return ListSupport(*(*opened)->driver, &CudaDevice::ipc_obstacle);
  }

  uint64_t DeviceBytes() const override {
    absl::MutexLock lock(&mutex_);
    return opened_ == nullptr ? 0 : opened_->allocations->mapped_bytes();
  }

  absl::StatusOr<std::unique_ptr<MappedRegion>> Open(RegionDescriptor descriptor) override {
    if (descriptor.ipc_handle.size() != kIpcHandleBytes) {
      return absl::InvalidArgumentError(absl::StrCat("ipc_handle of ", descriptor.ipc_handle.size(),
                                                     " bytes, want ", kIpcHandleBytes));
    }
    KEEPSET_RETURN_IF_ERROR(CheckDeviceExtent(descriptor));
    KEEPSET_ASSIGN_OR_RETURN(const std::shared_ptr<Opened> opened, Driver());
    KEEPSET_ASSIGN_OR_RETURN(const CudaDevice device, FindDevice(*opened->driver, descriptor));
    KEEPSET_RETURN_IF_ERROR(
        RefuseForObstacle(device, device.ipc_obstacle, "cuda_vmm, or memory of the host (memfd)"));
    KEEPSET_ASSIGN_OR_RETURN(
        std::shared_ptr<IpcAllocations::Use> use,
        opened->allocations->Open(device.ordinal, descriptor.ipc_handle, descriptor.generation,
                                  descriptor.seen_generations.get()));
    const DeviceRange range = use->range();
    KEEPSET_RETURN_IF_ERROR(CheckAllocation(range, descriptor.allocation_bytes));
    return NewDeviceRegion(kKind, range, descriptor,
                           [use = std::move(use)]() mutable { use.reset(); });
  }

  uint64_t AllocationBytes(uint64_t length) const override { return DeviceAllocationBytes(length); }

  absl::StatusOr<OwnedMemory> Create(uint64_t length, const std::string& device_uuid) override {
    const RegionDescriptor descriptor = OwnedDescriptor(length, device_uuid);
    KEEPSET_ASSIGN_OR_RETURN(const std::shared_ptr<Opened> opened, Driver());
    KEEPSET_ASSIGN_OR_RETURN(const CudaDevice device, FindDevice(*opened->driver, descriptor));
    KEEPSET_RETURN_IF_ERROR(
        RefuseForObstacle(device, device.ipc_obstacle, "cuda_vmm, or memory of the host (memfd)"));
    KEEPSET_ASSIGN_OR_RETURN(
        ExportedIpc exported,
        opened->driver->AllocateIpc(device.ordinal, descriptor.allocation_bytes));
    OwnedMemory memory;
    memory.ipc_handle = std::move(exported.handle);
    memory.region = NewDeviceRegion(
        kKind, exported.range, descriptor,
        [driver = opened->driver, ordinal = device.ordinal, base = exported.range.base] {
          // A driver that refuses has lost the memory already (the device failed).
          static_cast<void>(driver->FreeIpc(ordinal, base));
        });
    return memory;
  }

 private:
  struct Opened {
    std::shared_ptr<CudaDriver> driver;
    std::shared_ptr<IpcAllocations> allocations;
  };

  absl::StatusOr<std::shared_ptr<Opened>> Driver() {
    absl::MutexLock loading(&loading_mutex_);
    {
      absl::MutexLock lock(&mutex_);
      if (opened_ != nullptr) return opened_;
    }
    KEEPSET_ASSIGN_OR_RETURN(std::shared_ptr<CudaDriver> driver, source_());
    auto allocations = std::make_shared<IpcAllocations>(driver);
    absl::MutexLock lock(&mutex_);
    opened_ = std::make_shared<Opened>(Opened{std::move(driver), std::move(allocations)});
    return opened_;
  }

  const CudaDriverSource source_;
  absl::Mutex loading_mutex_;  // held while a driver is loaded; before mutex_
  mutable absl::Mutex mutex_;
  std::shared_ptr<Opened> opened_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

CudaDriverSource LoadOnce(const std::string& library) {
  struct State {
    absl::Mutex mutex;
    std::shared_ptr<CudaDriver> driver ABSL_GUARDED_BY(mutex);
  };
  return [library,
          state = std::make_shared<State>()]() -> absl::StatusOr<std::shared_ptr<CudaDriver>> {
    absl::MutexLock lock(&state->mutex);
    if (state->driver == nullptr) {
      KEEPSET_ASSIGN_OR_RETURN(state->driver, CudaDriver::Load(library));
    }
    return state->driver;
  };
}

std::unique_ptr<MemoryTransport> NewCudaIpcTransport(CudaDriverSource driver) {
  return std::make_unique<CudaIpcTransport>(std::move(driver));
}

std::unique_ptr<MemoryTransport> NewBuiltinCudaIpcTransport() {
  return NewCudaIpcTransport(LoadOnce(kLibcuda));
}

}  // namespace keepset::service
