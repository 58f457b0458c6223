// A libcuda.so of host memory, for tests of everything around the driver: entry points, sharing
// between processes, counted mappings, errors. Two devices, peers of each other; "device memory" is
// a memfd that is called after its device, an IPC handle names it by process, descriptor and serial
// number.
//
// What it imitates of the driver: one mapping per allocation and process, gone with one close; an
// exporter that is this very process is refused as an invalid context; legacy handles for plain
// allocations only; a VMM mapping beyond the allocation is an invalid value; a copy of pageable
// memory to the device is staged when its call returns, and arrives when the context is
// synchronised.
//
// KEEPSET_FAKE_BLOCKS: plain allocations come out of blocks of 2 MiB, which a legacy handle shares
// whole (CUDA C++ Programming Guide, "Interprocess Communication"): a small one lies in the middle
// of a block, and the importer's range is the block. "inside": its pointer is of the allocation.
// "base": it is of the block. Unset: the importer's range is the allocation.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <set>
#include <string>
#include <system_error>
#include <vector>

#include "tests/fakes/fake_cuda_memory.h"

namespace {

using namespace keepset::fake_cuda;

}  // namespace

extern "C" {

Result cuInit(unsigned int) { return kSuccess; }

Result cuGetErrorName(Result error, const char** name) {
  switch (error) {
    case kInvalidValue:
      *name = "CUDA_ERROR_INVALID_VALUE";
      return kSuccess;
    case kInvalidContext:
      *name = "CUDA_ERROR_INVALID_CONTEXT";
      return kSuccess;
    case kInvalidHandle:
      *name = "CUDA_ERROR_INVALID_HANDLE";
      return kSuccess;
    default:
      *name = nullptr;
      return kInvalidValue;
  }
}

Result cuDeviceGetCount(int* count) {
  *count = kNumDevices;
  return kSuccess;
}
Result cuDeviceGet(Device* device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && ordinal < kNumDevices ? kSuccess : kInvalidDevice;
}
Result cuDeviceGetName(char* name, int length, Device) {
  const char* const wanted = std::getenv("KEEPSET_FAKE_DEVICE_NAME");
  std::snprintf(name, static_cast<size_t>(length), "%s",
                wanted == nullptr ? "fake device" : wanted);
  return kSuccess;
}
Result cuDeviceGetAttribute(int* value, int attribute, Device) {
  switch (attribute) {
    case kDeviceAttributeMpsEnabled:
      *value = std::getenv("KEEPSET_FAKE_MPS") != nullptr ? 1 : 0;
      return kSuccess;
    case kDeviceAttributeUnifiedAddressing:
    case kDeviceAttributeVmmSupported:
      *value = 1;
      return kSuccess;
    case kDeviceAttributeIpcSupported:
      *value = std::getenv("KEEPSET_FAKE_NO_IPC") == nullptr ? 1 : 0;
      return kSuccess;
    case kDeviceAttributePosixFdSupported:
      *value = std::getenv("KEEPSET_FAKE_NO_FD") == nullptr ? 1 : 0;
      return kSuccess;
    default:
      return kInvalidValue;
  }
}
Result cuDeviceGetUuid_v2(Uuid* uuid, Device device) {
  for (int i = 0; i < 16; ++i) {
    uuid->bytes[i] = static_cast<unsigned char>(device == 0 ? i * 17 : 255 - i * 17);
  }
  return kSuccess;
}
Result cuDevicePrimaryCtxRetain(Context* context, Device device) {
  const std::lock_guard lock(state().mutex);
  ++state().contexts[device].retains;
  *context = &state().contexts[device];
  return kSuccess;
}
Result cuDevicePrimaryCtxRelease_v2(Device device) {
  const std::lock_guard lock(state().mutex);
  return --state().contexts[device].retains >= 0 ? kSuccess : kInvalidContext;
}
Result cuCtxPushCurrent_v2(Context context) {
  current_contexts().push_back(static_cast<PrimaryContext*>(context));
  return kSuccess;
}
Result cuCtxPopCurrent_v2(Context*) {
  if (current_contexts().empty()) return kInvalidContext;
  current_contexts().pop_back();
  return kSuccess;
}

Result cuMemAlloc_v2(DevicePointer* pointer, size_t bytes) {
  const std::lock_guard lock(state().mutex);
  if (const Result error = Wanted("KEEPSET_FAKE_ALLOCATE_ERROR"); error != kSuccess) return error;
  const uint64_t block = BlockBytes(bytes);
  const uint64_t in_block = PlaceInBlock(bytes);
  const int fd = NewMemory(block);
  void* const data = fd < 0 ? nullptr : MapAtGranule(fd, block);
  if (data == nullptr) return kOutOfMemory;
  *pointer = reinterpret_cast<uint64_t>(data) + in_block;
  state().mapped[*pointer] = {
      Kind::kPlain, CurrentDevice(), fd, bytes, state().next_serial++, {}, 0, block, in_block};
  return kSuccess;
}
Result cuMemFree_v2(DevicePointer pointer) {
  const std::lock_guard lock(state().mutex);
  const auto it = state().mapped.find(pointer);
  if (it == state().mapped.end() || it->second.kind != Kind::kPlain) return kInvalidValue;
  FinishUploads();
  ::munmap(reinterpret_cast<void*>(pointer - it->second.in_block), it->second.block_bytes);
  ::close(it->second.fd);
  state().mapped.erase(it);
  return kSuccess;
}

// Work of a stream is done when it is queued.
Result cuStreamCreate(Stream* stream, unsigned int) {
  if (current_contexts().empty()) return kInvalidContext;
  *stream = new char;
  return kSuccess;
}
Result cuStreamDestroy_v2(Stream stream) {
  delete static_cast<char*>(stream);
  return kSuccess;
}
Result cuStreamSynchronize(Stream) { return kSuccess; }
Result cuMemsetD8Async(DevicePointer to, unsigned char value, size_t bytes, Stream) {
  std::memset(reinterpret_cast<void*>(to), value, bytes);
  return kSuccess;
}

Result cuMemcpyHtoD_v2(DevicePointer to, const void* from, size_t bytes) {
  const std::lock_guard lock(state().mutex);
  const auto* const first = static_cast<const unsigned char*>(from);
  state().uploads.push_back({to, {first, first + bytes}});
  return kSuccess;
}
Result cuCtxSynchronize() {
  const std::lock_guard lock(state().mutex);
  FinishUploads();
  return kSuccess;
}
Result cuMemcpyDtoH_v2(void* to, DevicePointer from, size_t bytes) {
  const std::lock_guard lock(state().mutex);
  FinishUploads();
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return kSuccess;
}

// Memory is in use as long as any process maps it, as on a device: counted over all processes.
Result cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
  std::map<uint64_t, size_t> in_use;  // by inode
  for (const auto& process : std::filesystem::directory_iterator(
           "/proc", std::filesystem::directory_options::skip_permission_denied)) {
    std::ifstream maps(process.path() / "maps");
    std::string line;
    while (std::getline(maps, line)) {
      unsigned long begin = 0;
      unsigned long end = 0;
      unsigned long inode = 0;
      if (line.find(kMemoryName) != std::string::npos &&
          std::sscanf(line.c_str(), "%lx-%lx %*s %*s %*s %lu", &begin, &end, &inode) == 3) {
        in_use[inode] = std::max(in_use[inode], static_cast<size_t>(end - begin));
      }
    }
  }
  *total_bytes = kDeviceBytes;
  *free_bytes = kDeviceBytes;
  for (const auto& [inode, bytes] : in_use) *free_bytes -= std::min(bytes, *free_bytes);
  return kSuccess;
}

Result cuMemGetAddressRange_v2(DevicePointer* base, size_t* bytes, DevicePointer pointer) {
  if (current_contexts().empty()) return kInvalidContext;
  const std::lock_guard lock(state().mutex);
  const auto* found = Find(pointer);
  if (found == nullptr) return kInvalidValue;
  *base = found->first;
  *bytes = found->second.bytes;
  return kSuccess;
}

Result cuPointerGetAttribute(void* data, int attribute, DevicePointer pointer) {
  const std::lock_guard lock(state().mutex);
  const auto* found = Find(pointer);
  if (found == nullptr) return kInvalidValue;
  switch (attribute) {
    case kPointerAttributeMemoryType:
      *static_cast<unsigned int*>(data) = kMemoryTypeDevice;
      return kSuccess;
    case kPointerAttributeDeviceOrdinal:
      *static_cast<int*>(data) = found->second.device;
      return kSuccess;
    case kPointerAttributeBufferId:
      *static_cast<unsigned long long*>(data) = found->second.serial;
      return kSuccess;
    case kPointerAttributeIsLegacyIpcCapable:
      *static_cast<unsigned int*>(data) = found->second.kind == Kind::kPlain ? 1 : 0;
      return kSuccess;
    case kPointerAttributeAllowedHandleTypes:
      *static_cast<unsigned long long*>(data) =
          found->second.kind == Kind::kVmm && state().unshareable.count(found->second.handle) == 0
              ? kHandleTypePosixFd
              : 0;
      return kSuccess;
    default:
      return kInvalidValue;
  }
}

Result cuIpcGetMemHandle(IpcHandle* handle, DevicePointer pointer) {
  const std::lock_guard lock(state().mutex);
  const auto* found = Find(pointer);
  if (found == nullptr || found->second.kind != Kind::kPlain) return kInvalidValue;
  struct stat info;
  if (::fstat(found->second.fd, &info) != 0) return kInvalidValue;
  const Allocation& allocation = found->second;
  const RawHandle raw = {::getpid(),  allocation.fd,          allocation.serial,  allocation.bytes,
                         info.st_ino, allocation.block_bytes, allocation.in_block};
  std::memset(handle, 0, sizeof(*handle));
  std::memcpy(handle, &raw, sizeof(raw));
  return kSuccess;
}

Result cuIpcOpenMemHandle_v2(DevicePointer* pointer, IpcHandle handle, unsigned int flags) {
  if (current_contexts().empty() || flags != kIpcLazyEnablePeerAccess) return kInvalidContext;
  const std::lock_guard lock(state().mutex);
  RawHandle raw;
  std::memcpy(static_cast<void*>(&raw), &handle, sizeof(raw));
  if (raw.process == ::getpid()) return kInvalidContext;
  if (const Result error = Wanted("KEEPSET_FAKE_IPC_ERROR"); error != kSuccess) return error;
  for (const auto& [base, allocation] : state().mapped) {
    if (allocation.kind == Kind::kImported &&
        std::memcmp(&allocation.from, &raw, sizeof(raw)) == 0) {
      *pointer = base + allocation.in_block;
      return kSuccess;
    }
  }
  char path[64];
  std::snprintf(path, sizeof(path), "/proc/%lld/fd/%d", static_cast<long long>(raw.process),
                raw.fd);
  const int fd = ::open(path, O_RDWR | O_CLOEXEC);
  struct stat info;
  if (fd < 0 || ::fstat(fd, &info) != 0 || info.st_ino != raw.inode ||
      static_cast<uint64_t>(info.st_size) != raw.block_bytes || raw.block_bytes == 0) {
    if (fd >= 0) ::close(fd);
    return kInvalidHandle;
  }
  const Device device = DeviceOf(fd).value_or(0);
  void* const data = MapShared(fd, raw.block_bytes);
  ::close(fd);
  if (data == nullptr) return kOutOfMemory;
  const auto base = reinterpret_cast<uint64_t>(data);
  const uint64_t in_block = Blocks() == "inside" ? raw.in_block : 0;
  *pointer = base + in_block;
  state().mapped[base] = {Kind::kImported, device,  -1, raw.block_bytes, raw.serial, raw, 0,
                          raw.block_bytes, in_block};
  return kSuccess;
}

Result cuIpcCloseMemHandle(DevicePointer pointer) {
  const std::lock_guard lock(state().mutex);
  const auto* const found = Find(pointer);
  if (found == nullptr || found->second.kind != Kind::kImported ||
      pointer != found->first + found->second.in_block) {
    return kInvalidValue;
  }
  FinishUploads();
  ::munmap(reinterpret_cast<void*>(found->first), found->second.bytes);
  state().mapped.erase(found->first);
  return kSuccess;
}

// For tests: mappings of this process, and the number of pushed contexts on this thread.
int fake_cuda_mappings() {
  const std::lock_guard lock(state().mutex);
  return static_cast<int>(state().mapped.size());
}
int fake_cuda_context_depth() { return static_cast<int>(current_contexts().size()); }
int fake_cuda_granularity_questions() {
  const std::lock_guard lock(state().mutex);
  return state().granularity_questions;
}
// Retains of a device's primary context that were not released.
int fake_cuda_retains(int device) {
  const std::lock_guard lock(state().mutex);
  return state().contexts[device].retains;
}

}  // extern "C"
