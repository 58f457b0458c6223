#include "clients/cpp/service_mapping.h"

#include <sys/mman.h>

#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "base/cuda_abi.h"
#include "base/status_macros.h"

namespace keepset::client {
namespace {

using cuda_abi::ImportApi;
using cuda_abi::Result;

class HostMapping final : public ServiceMapping {
 public:
  HostMapping(void* data, size_t bytes) : data_(data), bytes_(bytes) {}
  ~HostMapping() override { static_cast<void>(Unmap()); }
  absl::Status Unmap() override {
    if (std::exchange(is_mapped_, false) && ::munmap(data_, bytes_) != 0) {
      return absl::InternalError(absl::StrCat("munmap: ", std::strerror(errno)));
    }
    return absl::OkStatus();
  }
  std::byte* data() const override { return static_cast<std::byte*>(data_); }

 private:
  void* const data_;
  const size_t bytes_;
  bool is_mapped_ = true;
};

absl::StatusOr<std::unique_ptr<ServiceMapping>> MapHost(const MappingSource& source) {
  void* const data =
      ::mmap(nullptr, source.allocation_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, source.fd, 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("mapping of ", source.allocation_bytes,
                                                     " bytes: mmap: ", std::strerror(errno)));
  }
  return std::make_unique<HostMapping>(data, source.allocation_bytes);
}

absl::Status Check(const ImportApi& api, Result result, absl::string_view call) {
  if (result == cuda_abi::kSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(call, ": ", cuda_abi::ErrorText(api, result)));
}

absl::StatusOr<cuda_abi::Device> FindDevice(const ImportApi& api, const std::string& uuid) {
  int count = 0;
  KEEPSET_RETURN_IF_ERROR(Check(api, api.device_get_count(&count), "cuDeviceGetCount"));
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    cuda_abi::Device device = 0;
    KEEPSET_RETURN_IF_ERROR(Check(api, api.device_get(&device, ordinal), "cuDeviceGet"));
    cuda_abi::Uuid found = {};
    KEEPSET_RETURN_IF_ERROR(Check(api, api.device_get_uuid(&found, device), "cuDeviceGetUuid"));
    if (cuda_abi::IsSameDevice(cuda_abi::UuidText(found), uuid)) return device;
  }
  return absl::FailedPreconditionError(
      absl::StrCat("device \"", uuid, "\" is none of the ", count,
                   " devices of this process: let its CUDA_VISIBLE_DEVICES list it"));
}

// Keeps the primary context of its device for as long as memory is mapped in it.
class DeviceMapping final : public ServiceMapping {
 public:
  explicit DeviceMapping(const ImportApi& api) : api_(api) {}
  ~DeviceMapping() override {
    static_cast<void>(Unmap());
    if (context_ != nullptr) static_cast<void>(api_.primary_release(device_));
  }

  absl::Status Map(const MappingSource& source) {
    KEEPSET_ASSIGN_OR_RETURN(device_, FindDevice(api_, source.device_uuid));
    KEEPSET_RETURN_IF_ERROR(
        Check(api_, api_.primary_retain(&context_, device_), "cuDevicePrimaryCtxRetain"));
    return InContext([&] { return source.kind == "cuda_ipc" ? OpenIpc(source) : MapVmm(source); });
  }

  absl::Status Unmap() override {
    const cuda_abi::DevicePointer base = std::exchange(base_, 0);
    return base == 0 ? absl::OkStatus() : InContext([&] { return Close(base); });
  }

  std::byte* data() const override { return std::bit_cast<std::byte*>(base_); }

 private:
  template <typename Work>
  absl::Status InContext(Work work) {
    KEEPSET_RETURN_IF_ERROR(Check(api_, api_.context_push(context_), "cuCtxPushCurrent"));
    const absl::Cleanup pop = [&] {
      cuda_abi::Context ignored = nullptr;
      static_cast<void>(api_.context_pop(&ignored));
    };
    return work();
  }

  absl::Status OpenIpc(const MappingSource& source) {
    cuda_abi::IpcHandle handle = {};
    if (source.ipc_handle.size() != sizeof(handle.reserved)) {
      return absl::InternalError(absl::StrCat("ipc_handle of ", source.ipc_handle.size(),
                                              " bytes, want ", sizeof(handle.reserved)));
    }
    std::memcpy(handle.reserved, source.ipc_handle.data(), sizeof(handle.reserved));
    return Check(api_, api_.ipc_open(&base_, handle, cuda_abi::kIpcLazyEnablePeerAccess),
                 "cuIpcOpenMemHandle");
  }

  absl::Status MapVmm(const MappingSource& source) {
    const uint64_t bytes = source.allocation_bytes;
    cuda_abi::AllocationHandle handle = 0;
    // The descriptor travels in the pointer argument.
    void* const os_handle = std::bit_cast<void*>(static_cast<intptr_t>(source.fd));
    KEEPSET_RETURN_IF_ERROR(
        Check(api_, api_.import_handle(&handle, os_handle, cuda_abi::kHandleTypePosixFd),
              "cuMemImportFromShareableHandle"));
    // The mapping keeps the memory.
    const absl::Cleanup release = [&] { static_cast<void>(api_.release(handle)); };
    cuda_abi::DevicePointer base = 0;
    KEEPSET_RETURN_IF_ERROR(
        Check(api_, api_.address_reserve(&base, bytes, 0, 0, 0), "cuMemAddressReserve"));
    absl::Cleanup free = [&] { static_cast<void>(api_.address_free(base, bytes)); };
    KEEPSET_RETURN_IF_ERROR(Check(api_, api_.map(base, bytes, 0, handle, 0), "cuMemMap"));
    absl::Cleanup unmap = [&] { static_cast<void>(api_.unmap(base, bytes)); };
    const cuda_abi::AccessDescriptor access = {{cuda_abi::kLocationTypeDevice, device_},
                                               cuda_abi::kAccessReadWrite};
    KEEPSET_RETURN_IF_ERROR(
        Check(api_, api_.set_access(base, bytes, &access, 1), "cuMemSetAccess"));
    std::move(unmap).Cancel();
    std::move(free).Cancel();
    base_ = base;
    mapped_bytes_ = bytes;
    return absl::OkStatus();
  }

  absl::Status Close(cuda_abi::DevicePointer base) {
    if (mapped_bytes_ == 0) return Check(api_, api_.ipc_close(base), "cuIpcCloseMemHandle");
    KEEPSET_RETURN_IF_ERROR(Check(api_, api_.unmap(base, mapped_bytes_), "cuMemUnmap"));
    // Addresses alone: the memory is not mapped any more.
    static_cast<void>(api_.address_free(base, mapped_bytes_));
    return absl::OkStatus();
  }

  const ImportApi api_;
  cuda_abi::Device device_ = 0;
  cuda_abi::Context context_ = nullptr;
  cuda_abi::DevicePointer base_ = 0;
  uint64_t mapped_bytes_ = 0;  // by cuda_vmm; 0: by cuda_ipc
};

absl::StatusOr<std::unique_ptr<ServiceMapping>> MapDevice(const MappingSource& source) {
  KEEPSET_ASSIGN_OR_RETURN(const ImportApi api, cuda_abi::LoadImportApi(source.library));
  KEEPSET_RETURN_IF_ERROR(Check(api, api.init(0), "cuInit"));
  auto mapping = std::make_unique<DeviceMapping>(api);
  KEEPSET_RETURN_IF_ERROR(mapping->Map(source));
  return mapping;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ServiceMapping>> ServiceMapping::Open(const MappingSource& source) {
  if (source.kind == "memfd") return MapHost(source);
  if (source.kind == "cuda_ipc" || source.kind == "cuda_vmm") return MapDevice(source);
  return absl::InvalidArgumentError(
      absl::StrCat("kind=\"", source.kind, "\", want one of: memfd, cuda_ipc, cuda_vmm"));
}

}  // namespace keepset::client
