#include "tests/gpu/ipc_driver.h"

#include <dlfcn.h>

#include "clients/cpp/device_memory.h"

namespace keepset::gpu {
namespace {

using cuda_abi::kSuccess;

}  // namespace

std::string Driver::Open() {
  void* const library = ::dlopen(client::kLibcuda, RTLD_NOW);
  if (library == nullptr) return "no device: no libcuda.so.1";
  const auto entry = [&]<typename Function>(const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(::dlsym(library, name));
    return function != nullptr;
  };
  cuda_abi::Result (*init)(unsigned int) = nullptr;
  cuda_abi::Result (*count)(int*) = nullptr;
  cuda_abi::Result (*retain)(cuda_abi::Context*, cuda_abi::Device) = nullptr;
  cuda_abi::Result (*push)(cuda_abi::Context) = nullptr;
  if (!entry("cuInit", init) || !entry("cuDeviceGetCount", count) ||
      !entry("cuDevicePrimaryCtxRetain", retain) || !entry("cuCtxPushCurrent_v2", push) ||
      !entry("cuMemAlloc_v2", allocate_) || !entry("cuMemFree_v2", free_) ||
      !entry("cuMemGetInfo_v2", info_) || !entry("cuMemcpyHtoD_v2", write_) ||
      !entry("cuMemcpyDtoH_v2", read_) || !entry("cuMemCreate", create_) ||
      !entry("cuMemRelease", release_) || !entry("cuMemAddressReserve", reserve_) ||
      !entry("cuMemAddressFree", give_back_) || !entry("cuMemMap", map_) ||
      !entry("cuMemUnmap", unmap_) || !entry("cuMemSetAccess", set_access_) ||
      !entry("cuCtxSynchronize", synchronize_) || !entry("cuIpcGetMemHandle", ipc_get_) ||
      !entry("cuMemGetAddressRange_v2", range_) || !entry("cuPointerGetAttribute", attribute_)) {
    return "no device: libcuda.so.1 lacks an entry point";
  }
  entry("cuMemsetD8_v2", set_);
  int devices = 0;
  cuda_abi::Context context = nullptr;
  if (init(0) != kSuccess || count(&devices) != kSuccess || devices == 0 ||
      retain(&context, 0) != kSuccess || push(context) != kSuccess) {
    return "no device: the driver gives none";
  }
  return "";
}

int64_t Driver::FreeBytes() const {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  if (info_(&free_bytes, &total_bytes) != kSuccess) return -1;
  return static_cast<int64_t>(free_bytes);
}

std::byte* Driver::Allocate(const std::string& kind, int64_t bytes) {
  cuda_abi::DevicePointer pointer = 0;
  const auto size = static_cast<size_t>(bytes);
  if (kind == kByVmm) {
    if (!AllocateVmm(size, &pointer)) return nullptr;
    mapped_[reinterpret_cast<std::byte*>(pointer)] = size;
  } else if (allocate_(&pointer, size) != kSuccess) {
    return nullptr;
  }
  if (set_ != nullptr && set_(pointer, 0, size) != kSuccess) return nullptr;
  if (synchronize_() != kSuccess) return nullptr;
  return reinterpret_cast<std::byte*>(pointer);
}

bool Driver::AllocateVmm(size_t bytes, cuda_abi::DevicePointer* pointer) const {
  const cuda_abi::AllocationProperties properties;
  cuda_abi::AllocationHandle handle = 0;
  if (create_(&handle, bytes, &properties, 0) != kSuccess) return false;
  const cuda_abi::AccessDescriptor access = {properties.location, cuda_abi::kAccessReadWrite};
  const bool is_mapped = reserve_(pointer, bytes, 0, 0, 0) == kSuccess &&
                         map_(*pointer, bytes, 0, handle, 0) == kSuccess &&
                         set_access_(*pointer, bytes, &access, 1) == kSuccess;
  // The mapping holds the memory from here on.
  return release_(handle) == kSuccess && is_mapped;
}

Driver::RawHandle Driver::HandleOf(const std::byte* memory) const {
  const auto pointer = reinterpret_cast<cuda_abi::DevicePointer>(memory);
  cuda_abi::IpcHandle handle = {};
  cuda_abi::DevicePointer base = 0;
  size_t bytes = 0;
  unsigned long long number = 0;
  if (ipc_get_(&handle, pointer) != kSuccess || range_(&base, &bytes, pointer) != kSuccess ||
      attribute_(&number, cuda_abi::kPointerAttributeBufferId, pointer) != kSuccess) {
    return {};
  }
  return {std::string(reinterpret_cast<const char*>(handle.reserved), sizeof(handle.reserved)),
          bytes, number};
}

bool Driver::Write(std::byte* to, const void* from, int64_t bytes) const {
  // A copy of pageable memory returns when it is staged; another process would find it half done.
  return write_(reinterpret_cast<cuda_abi::DevicePointer>(to), from, static_cast<size_t>(bytes)) ==
             kSuccess &&
         synchronize_() == kSuccess;
}

bool Driver::Read(void* to, const std::byte* from, int64_t bytes) const {
  return read_(to, reinterpret_cast<cuda_abi::DevicePointer>(from), static_cast<size_t>(bytes)) ==
         kSuccess;
}

bool Driver::Free(std::byte* memory) {
  const auto pointer = reinterpret_cast<cuda_abi::DevicePointer>(memory);
  const auto found = mapped_.find(memory);
  if (found == mapped_.end()) return free_(pointer) == kSuccess;
  const size_t bytes = found->second;
  mapped_.erase(found);
  return unmap_(pointer, bytes) == kSuccess && give_back_(pointer, bytes) == kSuccess;
}

}  // namespace keepset::gpu
