#include "service/memory/cuda_driver.h"

#include <bit>
#include <cstring>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/cuda_abi.h"
#include "base/status_macros.h"
#include "service/memory/cuda_driver_status.h"

namespace keepset::service {
namespace {

using cuda_abi::Result;

constexpr size_t kMaxDeviceName = 256;

class Libcuda final : public CudaDriver {
 public:
  Libcuda(const cuda_abi::ImportApi& api, const cuda_abi::AllocateApi& memory)
      : api_(api), memory_(memory) {}

  ~Libcuda() override {
    const absl::MutexLock lock(&mutex_);
    for (size_t i = 0; i < contexts_.size(); ++i) {
      if (contexts_[i] != nullptr) static_cast<void>(api_.primary_release(devices_[i].ordinal));
    }
  }

  absl::Status Init() {
    if (const Result result = api_.init(0); result != cuda_abi::kSuccess) {
      return absl::FailedPreconditionError(absl::StrCat("cuInit: ", ErrorText(api_, result)));
    }
    int count = 0;
    KEEPSET_RETURN_IF_ERROR(Check(api_.device_get_count(&count), "cuDeviceGetCount"));
    if (count < 1) return absl::FailedPreconditionError("the CUDA driver sees no device");
    for (int ordinal = 0; ordinal < count; ++ordinal) {
      cuda_abi::Device device = 0;
      KEEPSET_RETURN_IF_ERROR(Check(api_.device_get(&device, ordinal), "cuDeviceGet"));
      char name[kMaxDeviceName] = {};
      KEEPSET_RETURN_IF_ERROR(
          Check(api_.device_get_name(name, kMaxDeviceName - 1, device), "cuDeviceGetName"));
      cuda_abi::Uuid uuid = {};
      KEEPSET_RETURN_IF_ERROR(Check(api_.device_get_uuid(&uuid, device), "cuDeviceGetUuid"));
      CudaDevice& found = devices_.emplace_back();
      found.ordinal = device;
      found.uuid = cuda_abi::UuidText(uuid);
      found.name = name;
      found.sharing_note = SharingNote(device, name);
      found.ipc_obstacle = Obstacle(
          device,
          {{cuda_abi::kDeviceAttributeUnifiedAddressing, "it has no unified addressing"},
           {cuda_abi::kDeviceAttributeIpcSupported, "the driver supports no CUDA IPC on it"}});
      found.vmm_obstacle = Obstacle(
          device, {{cuda_abi::kDeviceAttributeVmmSupported, "it has no virtual memory management"},
                   {cuda_abi::kDeviceAttributePosixFdSupported,
                    "its memory is not shared by descriptors"}});
    }
    const absl::MutexLock lock(&mutex_);
    contexts_.resize(devices_.size());
    return absl::OkStatus();
  }

  const std::vector<CudaDevice>& devices() const override { return devices_; }

  absl::StatusOr<DeviceRange> OpenIpc(int device, absl::string_view handle) override {
    if (handle.size() != kIpcHandleBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("ipc_handle of ", handle.size(), " bytes, want ", kIpcHandleBytes));
    }
    cuda_abi::IpcHandle raw;
    std::memcpy(raw.reserved, handle.data(), handle.size());
    return In<DeviceRange>(device, [&]() -> absl::StatusOr<DeviceRange> {
      cuda_abi::DevicePointer base = 0;
      const Result opened = api_.ipc_open(&base, raw, cuda_abi::kIpcLazyEnablePeerAccess);
      // The driver uses this code for an exporter that it takes for this very process.
      if (opened == cuda_abi::kInvalidContext) {
        return absl::FailedPreconditionError(
            "cuIpcOpenMemHandle: exporter and keepsetd have the same process id: they are one "
            "process, or two containers whose process ids happen to be equal; share the PID "
            "namespace or use cuda_vmm");
      }
      KEEPSET_RETURN_IF_ERROR(CheckImport(opened, "cuIpcOpenMemHandle"));
      cuda_abi::DevicePointer range_base = 0;
      size_t bytes = 0;
      const absl::Status range =
          Check(api_.address_range(&range_base, &bytes, base), "cuMemGetAddressRange");
      absl::Cleanup close = [&] { static_cast<void>(api_.ipc_close(base)); };
      KEEPSET_RETURN_IF_ERROR(range);
      if (range_base > base || base - range_base >= bytes) {
        return absl::InternalError("the driver mapped an IPC handle outside of its own range");
      }
      KEEPSET_RETURN_IF_ERROR(CheckPlace(device, base));
      std::move(close).Cancel();
      const uint64_t before = base - range_base;
      return DeviceRange{base, bytes - before, before};
    });
  }

  absl::Status CloseIpc(int device, uint64_t base) override {
    return In<bool>(device,
                    [&]() -> absl::StatusOr<bool> {
                      KEEPSET_RETURN_IF_ERROR(Check(api_.ipc_close(base), "cuIpcCloseMemHandle"));
                      return true;
                    })
        .status();
  }

  absl::StatusOr<DeviceRange> MapVmm(int device, int fd, uint64_t bytes,
                                     RegionAccess access) override {
    return In<DeviceRange>(device, [&]() -> absl::StatusOr<DeviceRange> {
      cuda_abi::AllocationHandle handle = 0;
      // The descriptor travels in the pointer argument.
      void* const os_handle = std::bit_cast<void*>(static_cast<intptr_t>(fd));
      KEEPSET_RETURN_IF_ERROR(
          CheckImport(api_.import_handle(&handle, os_handle, cuda_abi::kHandleTypePosixFd),
                      "cuMemImportFromShareableHandle"));
      const absl::Cleanup release = [&] { static_cast<void>(api_.release(handle)); };
      return MapHandle(device, handle, bytes, access, MemoryOf::kAnother);
    });
  }

  absl::Status UnmapVmm(int device, const DeviceRange& range) override {
    return In<bool>(device,
                    [&]() -> absl::StatusOr<bool> {
                      const absl::Status unmapped =
                          Check(api_.unmap(range.base, range.bytes), "cuMemUnmap");
                      const absl::Status freed =
                          Check(api_.address_free(range.base, range.bytes), "cuMemAddressFree");
                      KEEPSET_RETURN_IF_ERROR(unmapped);
                      KEEPSET_RETURN_IF_ERROR(freed);
                      return true;
                    })
        .status();
  }

  absl::StatusOr<ExportedIpc> AllocateIpc(int device, uint64_t bytes) override {
    return In<ExportedIpc>(device, [&]() -> absl::StatusOr<ExportedIpc> {
      cuda_abi::DevicePointer base = 0;
      KEEPSET_RETURN_IF_ERROR(Check(memory_.allocate(&base, bytes), "cuMemAlloc", MemoryOf::kOurs));
      absl::Cleanup free = [&] { static_cast<void>(memory_.free(base)); };
      KEEPSET_RETURN_IF_ERROR(Zero(base, bytes));
      cuda_abi::IpcHandle handle = {};
      KEEPSET_RETURN_IF_ERROR(
          Check(memory_.ipc_get(&handle, base), "cuIpcGetMemHandle", MemoryOf::kOurs));
      cuda_abi::DevicePointer range_base = 0;
      size_t range_bytes = 0;
      KEEPSET_RETURN_IF_ERROR(Check(api_.address_range(&range_base, &range_bytes, base),
                                    "cuMemGetAddressRange", MemoryOf::kOurs));
      // What the handle opens, and the size that the worker is told. The driver's range is that of
      // the allocation: that no other one shares its block only its place tells.
      if (range_base != base || range_bytes != bytes ||
          base % cuda_abi::kAllocationGranularity != 0) {
        return absl::InternalError(absl::StrCat(
            "cuMemAlloc of ", bytes, " bytes answered a part of a block: ", range_bytes, " bytes, ",
            base % cuda_abi::kAllocationGranularity, " beyond a multiple of ",
            cuda_abi::kAllocationGranularity, ", want cuda_vmm"));
      }
      std::move(free).Cancel();
      return ExportedIpc{
          {base, bytes},
          std::string(reinterpret_cast<const char*>(handle.reserved), sizeof(handle.reserved))};
    });
  }

  absl::Status FreeIpc(int device, uint64_t base) override {
    return In<bool>(
               device,
               [&]() -> absl::StatusOr<bool> {
                 KEEPSET_RETURN_IF_ERROR(Check(memory_.free(base), "cuMemFree", MemoryOf::kOurs));
                 return true;
               })
        .status();
  }

  absl::StatusOr<ExportedVmm> AllocateVmm(int device, uint64_t bytes) override {
    return In<ExportedVmm>(device, [&]() -> absl::StatusOr<ExportedVmm> {
      cuda_abi::AllocationProperties properties;
      properties.location.id = device;
      KEEPSET_RETURN_IF_ERROR(CheckGranularity(properties));
      cuda_abi::AllocationHandle handle = 0;
      KEEPSET_RETURN_IF_ERROR(
          Check(memory_.create(&handle, bytes, &properties, 0), "cuMemCreate", MemoryOf::kOurs));
      // Mapping and descriptor keep the memory.
      const absl::Cleanup release = [&] { static_cast<void>(api_.release(handle)); };
      KEEPSET_ASSIGN_OR_RETURN(
          const DeviceRange range,
          MapHandle(device, handle, bytes, RegionAccess::kReadWrite, MemoryOf::kOurs));
      absl::Cleanup unmap = [&] {
        static_cast<void>(api_.unmap(range.base, range.bytes));
        static_cast<void>(api_.address_free(range.base, range.bytes));
      };
      KEEPSET_RETURN_IF_ERROR(Zero(range.base, bytes));
      int fd = -1;
      KEEPSET_RETURN_IF_ERROR(
          Check(memory_.export_handle(&fd, handle, cuda_abi::kHandleTypePosixFd, 0),
                "cuMemExportToShareableHandle", MemoryOf::kOurs));
      std::move(unmap).Cancel();
      return ExportedVmm{range, UniqueFd(fd)};
    });
  }

 private:
  // On a stream of its own: work of others on the device is neither waited for nor held up.
  absl::Status Zero(cuda_abi::DevicePointer base, uint64_t bytes) const {
    cuda_abi::Stream stream = nullptr;
    KEEPSET_RETURN_IF_ERROR(Check(memory_.stream_create(&stream, cuda_abi::kStreamNonBlocking),
                                  "cuStreamCreate", MemoryOf::kOurs));
    const absl::Cleanup destroy = [&] { static_cast<void>(memory_.stream_destroy(stream)); };
    KEEPSET_RETURN_IF_ERROR(
        Check(memory_.fill(base, 0, bytes, stream), "cuMemsetD8Async", MemoryOf::kOurs));
    return Check(memory_.stream_synchronize(stream), "cuStreamSynchronize", MemoryOf::kOurs);
  }

  // Whether whole granules of ours are whole granules of the device, asked once of each.
  absl::Status CheckGranularity(const cuda_abi::AllocationProperties& properties) {
    const int device = properties.location.id;
    size_t granularity = 0;
    {
      const absl::MutexLock lock(&mutex_);
      size_t& known = granularities_[device];
      if (known == 0) {
        KEEPSET_RETURN_IF_ERROR(
            Check(memory_.granularity(&granularity, &properties, cuda_abi::kGranularityMinimum),
                  "cuMemGetAllocationGranularity", MemoryOf::kOurs));
        known = granularity;
      }
      granularity = known;
    }
    if (granularity > 0 && cuda_abi::kAllocationGranularity % granularity == 0) {
      return absl::OkStatus();
    }
    return absl::FailedPreconditionError(
        absl::StrCat("device ", Uuid(device), " shares memory in pieces of ", granularity,
                     " bytes, want a divisor of ", cuda_abi::kAllocationGranularity,
                     ": ask for cuda_ipc, or memory of the host (memfd)"));
  }

  // In the device's context. The mapping keeps the memory without the handle.
  absl::StatusOr<DeviceRange> MapHandle(int device, cuda_abi::AllocationHandle handle,
                                        uint64_t bytes, RegionAccess access,
                                        MemoryOf memory) const {
    cuda_abi::DevicePointer base = 0;
    KEEPSET_RETURN_IF_ERROR(
        Check(api_.address_reserve(&base, bytes, 0, 0, 0), "cuMemAddressReserve", memory));
    absl::Cleanup free = [&] { static_cast<void>(api_.address_free(base, bytes)); };
    KEEPSET_RETURN_IF_ERROR(Check(api_.map(base, bytes, 0, handle, 0), "cuMemMap", memory));
    absl::Cleanup unmap = [&] { static_cast<void>(api_.unmap(base, bytes)); };
    KEEPSET_RETURN_IF_ERROR(Check(Allow(device, base, bytes, access), "cuMemSetAccess", memory));
    KEEPSET_RETURN_IF_ERROR(CheckPlace(device, base));
    std::move(unmap).Cancel();
    std::move(free).Cancel();
    return DeviceRange{base, bytes};
  }

  struct Need {
    int attribute;
    absl::string_view without;
  };
  // What the device lacks; a driver that does not know an attribute says nothing about it.
  std::string Obstacle(cuda_abi::Device device, std::initializer_list<Need> needs) const {
    for (const Need& need : needs) {
      int value = 0;
      if (api_.device_attribute(&value, need.attribute, device) == cuda_abi::kSuccess &&
          value == 0) {
        return std::string(need.without);
      }
    }
    return "";
  }

  // Not every driver maps memory of a device for reading alone. That a region which the worker
  // registered read-only is never written is the service's own rule (MappedRegion::access).
  cuda_abi::Result Allow(int device, cuda_abi::DevicePointer base, uint64_t bytes,
                         RegionAccess access) const {
    cuda_abi::AccessDescriptor descriptor = {
        {cuda_abi::kLocationTypeDevice, device},
        access == RegionAccess::kReadWrite ? cuda_abi::kAccessReadWrite : cuda_abi::kAccessRead};
    const cuda_abi::Result result = api_.set_access(base, bytes, &descriptor, 1);
    const bool is_unknown = result == cuda_abi::kNotSupported || result == cuda_abi::kInvalidValue;
    if (!is_unknown || access == RegionAccess::kReadWrite) return result;
    descriptor.flags = cuda_abi::kAccessReadWrite;
    return api_.set_access(base, bytes, &descriptor, 1);
  }

  std::string SharingNote(cuda_abi::Device device, absl::string_view name) const {
    // The driver names instances "NVIDIA H100 80GB HBM3 MIG 1g.10gb".
    if (absl::StrContains(name, " MIG ")) {
      return absl::StrCat("device \"", name,
                          "\" is a MIG instance, whose memory cannot be shared "
                          "with other GPU instances: worker and keepsetd need the same one");
    }
    // Older drivers do not know the attribute.
    int has_mps = 0;
    if (api_.device_attribute(&has_mps, cuda_abi::kDeviceAttributeMpsEnabled, device) ==
            cuda_abi::kSuccess &&
        has_mps != 0) {
      return absl::StrCat("device \"", name,
                          "\" is used through MPS: worker and keepsetd need the "
                          "same MPS server and user id");
    }
    return "";
  }

  // A context takes hundreds of megabytes of its device: only devices that regions name have one.
  absl::StatusOr<cuda_abi::Context> ContextOf(size_t index) {
    const absl::MutexLock lock(&mutex_);
    if (contexts_[index] == nullptr) {
      cuda_abi::Context context = nullptr;
      KEEPSET_RETURN_IF_ERROR(Check(api_.primary_retain(&context, devices_[index].ordinal),
                                    "cuDevicePrimaryCtxRetain"));
      contexts_[index] = context;
    }
    return contexts_[index];
  }

  std::string Uuid(int device) const {
    for (const CudaDevice& known : devices_) {
      if (known.ordinal == device) return known.uuid;
    }
    return absl::StrCat("device ordinal ", device);
  }

  // The driver maps memory of a peer, too; kernels would read it over the bus between the devices.
  absl::Status CheckPlace(int device, cuda_abi::DevicePointer base) const {
    int actual = 0;
    KEEPSET_RETURN_IF_ERROR(
        Check(api_.pointer_attribute(&actual, cuda_abi::kPointerAttributeDeviceOrdinal, base),
              "cuPointerGetAttribute"));
    if (actual == device) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("device_uuid=\"", Uuid(device),
                                                   "\": the memory is of device \"", Uuid(actual),
                                                   "\", register it with that one"));
  }

  // Runs `work` with the device's primary context current on this thread.
  template <typename Value, typename Work>
  absl::StatusOr<Value> In(int device, Work work) {
    for (size_t i = 0; i < devices_.size(); ++i) {
      if (devices_[i].ordinal != device) continue;
      KEEPSET_ASSIGN_OR_RETURN(const cuda_abi::Context context, ContextOf(i));
      KEEPSET_RETURN_IF_ERROR(Check(api_.context_push(context), "cuCtxPushCurrent"));
      const absl::Cleanup pop = [&] {
        cuda_abi::Context ignored = nullptr;
        static_cast<void>(api_.context_pop(&ignored));
      };
      absl::StatusOr<Value> result = work();
      const bool concerns_sharing =
          absl::IsInvalidArgument(result.status()) || absl::IsFailedPrecondition(result.status());
      if (!concerns_sharing || devices_[i].sharing_note.empty()) return result;
      return absl::Status(result.status().code(),
                          absl::StrCat(result.status().message(), "; ", devices_[i].sharing_note));
    }
    return absl::InternalError(absl::StrCat("device ordinal ", device, " is not the driver's"));
  }

  absl::Status Check(Result result, absl::string_view call,
                     MemoryOf memory = MemoryOf::kAnother) const {
    return result == cuda_abi::kSuccess
               ? absl::OkStatus()
               : DriverError(result, absl::StrCat(call, ": ", ErrorText(api_, result)), memory);
  }

  // Of a call that opens what a worker announced: a code that Check leaves Internal is the answer
  // to that worker, whose handle is of memory or a process that is gone, unless it tells of a
  // device that nothing works on any more.
  absl::Status CheckImport(Result result, absl::string_view call) const {
    absl::Status status = Check(result, call);
    if (!absl::IsInternal(status) || cuda_abi::IsLost(result)) return status;
    return absl::InvalidArgumentError(absl::StrCat(
        status.message(), ", the handle is of freed memory or of a process that has ended"));
  }

  const cuda_abi::ImportApi api_;
  const cuda_abi::AllocateApi memory_;
  std::vector<CudaDevice> devices_;
  absl::Mutex mutex_;
  // Beside devices_; null until first needed.
  std::vector<cuda_abi::Context> contexts_ ABSL_GUARDED_BY(mutex_);
  std::map<int, size_t> granularities_ ABSL_GUARDED_BY(mutex_);  // of memory to share, by ordinal
};

}  // namespace

absl::StatusOr<std::shared_ptr<CudaDriver>> CudaDriver::Load(const std::string& library) {
  KEEPSET_ASSIGN_OR_RETURN(const cuda_abi::ImportApi api, cuda_abi::LoadImportApi(library));
  KEEPSET_ASSIGN_OR_RETURN(const cuda_abi::AllocateApi memory, cuda_abi::LoadAllocateApi(library));
  auto driver = std::make_shared<Libcuda>(api, memory);
  KEEPSET_RETURN_IF_ERROR(driver->Init());
  return driver;
}

}  // namespace keepset::service
