#include "clients/cpp/device_memory.h"

#include <unistd.h>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "base/cuda_abi.h"
#include "base/status_macros.h"

namespace keepset::client {
namespace {

using cuda_abi::ExportApi;
using cuda_abi::Result;

constexpr uint64_t kAlignment = 16;

absl::Status Check(const ExportApi& api, Result result, absl::string_view call) {
  if (result == cuda_abi::kSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(call, ": ", cuda_abi::ErrorText(api, result)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceRegion>> DeviceRegion::Export(void* data, int64_t size_bytes,
                                                                   const std::string& library) {
  const auto pointer = static_cast<cuda_abi::DevicePointer>(reinterpret_cast<uintptr_t>(data));
  if (size_bytes < 1) {
    return absl::InvalidArgumentError(absl::StrCat("size_bytes=", size_bytes, ", want 1 or more"));
  }
  if (pointer % kAlignment != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("device pointer is not a multiple of ", kAlignment));
  }
  KEEPSET_ASSIGN_OR_RETURN(const ExportApi api, cuda_abi::LoadExportApi(library));
  KEEPSET_RETURN_IF_ERROR(Check(api, api.init(0), "cuInit"));
  unsigned int memory_type = 0;
  if (api.pointer_attribute(&memory_type, cuda_abi::kPointerAttributeMemoryType, pointer) !=
          cuda_abi::kSuccess ||
      memory_type != cuda_abi::kMemoryTypeDevice) {
    return absl::InvalidArgumentError(
        "the pointer is not of device memory; host memory goes "
        "through SharedRegion");
  }
  std::unique_ptr<DeviceRegion> region(new DeviceRegion());
  region->data_ = static_cast<std::byte*>(data);
  region->size_bytes_ = size_bytes;

  int ordinal = 0;
  KEEPSET_RETURN_IF_ERROR(
      Check(api, api.pointer_attribute(&ordinal, cuda_abi::kPointerAttributeDeviceOrdinal, pointer),
            "device of the pointer"));
  cuda_abi::Device device = 0;
  KEEPSET_RETURN_IF_ERROR(Check(api, api.device_get(&device, ordinal), "cuDeviceGet"));
  // This thread may have no context of the device yet.
  cuda_abi::Context context = nullptr;
  KEEPSET_RETURN_IF_ERROR(
      Check(api, api.primary_retain(&context, device), "cuDevicePrimaryCtxRetain"));
  const absl::Cleanup release_context = [&] { static_cast<void>(api.primary_release(device)); };
  KEEPSET_RETURN_IF_ERROR(Check(api, api.context_push(context), "cuCtxPushCurrent"));
  const absl::Cleanup pop = [&] {
    cuda_abi::Context ignored = nullptr;
    static_cast<void>(api.context_pop(&ignored));
  };

  cuda_abi::DevicePointer base = 0;
  size_t allocation_bytes = 0;
  KEEPSET_RETURN_IF_ERROR(
      Check(api, api.address_range(&base, &allocation_bytes, pointer), "cuMemGetAddressRange"));
  region->offset_ = pointer - base;
  region->allocation_bytes_ = allocation_bytes;
  if (static_cast<uint64_t>(size_bytes) > allocation_bytes - region->offset_) {
    return absl::InvalidArgumentError(absl::StrCat(
        "size_bytes=", size_bytes, " reaches beyond its allocation, which has ",
        allocation_bytes - region->offset_,
        " bytes left: memory that grows in segments (PyTorch's expandable_segments:True) cannot be "
        "shared as one region; start the engine with expandable_segments:False"));
  }
  cuda_abi::Uuid uuid = {};
  KEEPSET_RETURN_IF_ERROR(Check(api, api.device_get_uuid(&uuid, device), "cuDeviceGetUuid"));
  region->device_uuid_ = cuda_abi::UuidText(uuid);
  unsigned long long number = 0;
  KEEPSET_RETURN_IF_ERROR(
      Check(api, api.pointer_attribute(&number, cuda_abi::kPointerAttributeBufferId, pointer),
            "number of the allocation"));
  region->generation_ = number;

  unsigned int legacy = 0;
  KEEPSET_RETURN_IF_ERROR(Check(
      api, api.pointer_attribute(&legacy, cuda_abi::kPointerAttributeIsLegacyIpcCapable, pointer),
      "kind of the allocation"));
  if (legacy != 0) {
    if (allocation_bytes < cuda_abi::kAllocationGranularity) {
      return absl::FailedPreconditionError(absl::StrCat(
          "an allocation of ", allocation_bytes,
          " bytes: the driver packs small ones in one block, and CUDA IPC would expose the "
          "neighbours; make it part of an allocation of at least ",
          cuda_abi::kAllocationGranularity, " bytes"));
    }
    cuda_abi::IpcHandle handle = {};
    KEEPSET_RETURN_IF_ERROR(Check(api, api.ipc_get(&handle, base), "cuIpcGetMemHandle"));
    region->kind_ = "cuda_ipc";
    region->ipc_handle_.assign(reinterpret_cast<const char*>(handle.reserved),
                               sizeof(handle.reserved));
    return region;
  }
  unsigned long long types = 0;
  KEEPSET_RETURN_IF_ERROR(Check(
      api, api.pointer_attribute(&types, cuda_abi::kPointerAttributeAllowedHandleTypes, pointer),
      "handle types of the allocation"));
  if ((types & cuda_abi::kHandleTypePosixFd) == 0) {
    return absl::FailedPreconditionError(
        "this memory can be shared neither by CUDA IPC nor by descriptor: it comes from a "
        "stream-ordered pool (cudaMallocAsync) or from segments made without an exportable handle; "
        "start the engine with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False and the native "
        "allocator, or allocate the KV pool with cudaMalloc");
  }
  cuda_abi::AllocationHandle handle = 0;
  KEEPSET_RETURN_IF_ERROR(Check(api, api.retain_handle(&handle, region->data_ - region->offset_),
                                "cuMemRetainAllocationHandle"));
  const absl::Cleanup release = [&] { static_cast<void>(api.release(handle)); };
  KEEPSET_RETURN_IF_ERROR(
      Check(api, api.export_handle(&region->fd_, handle, cuda_abi::kHandleTypePosixFd, 0),
            "cuMemExportToShareableHandle"));
  region->kind_ = "cuda_vmm";
  return region;
}

DeviceRegion::~DeviceRegion() {
  if (fd_ >= 0) ::close(fd_);
}

bool DeviceRegion::Contains(const void* data, int64_t size_bytes) const {
  const auto begin = reinterpret_cast<uintptr_t>(data_);
  const auto first = reinterpret_cast<uintptr_t>(data);
  return size_bytes >= 0 && first >= begin && size_bytes <= size_bytes_ &&
         first - begin <= static_cast<uintptr_t>(size_bytes_ - size_bytes);
}

}  // namespace keepset::client
