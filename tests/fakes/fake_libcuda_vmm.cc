// Virtual memory management of the fake driver (fake_libcuda.cc).
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>

#include "tests/fakes/fake_cuda_memory.h"

namespace {

using namespace keepset::fake_cuda;

}  // namespace

extern "C" {

Result cuMemGetAllocationGranularity(size_t* bytes, const void*, int) {
  const std::lock_guard lock(state().mutex);
  ++state().granularity_questions;
  const char* const wanted = std::getenv("KEEPSET_FAKE_GRANULARITY");
  *bytes = wanted == nullptr ? kGranularity : std::strtoull(wanted, nullptr, 10);
  return kSuccess;
}
// properties: CUmemAllocationProp, whose second word holds the kinds of handle; null: a descriptor.
Result cuMemCreate(AllocationHandle* handle, size_t bytes, const void* properties,
                   unsigned long long) {
  const std::lock_guard lock(state().mutex);
  if (bytes % kGranularity != 0) return kInvalidValue;
  if (const Result error = Wanted("KEEPSET_FAKE_ALLOCATE_ERROR"); error != kSuccess) return error;
  const int fd = NewMemory(bytes);
  if (fd < 0) return kOutOfMemory;
  *handle = state().next_handle++;
  state().handles[*handle] = fd;
  const auto* const words = static_cast<const int*>(properties);
  if (words != nullptr && (words[1] & kHandleTypePosixFd) == 0) {
    state().unshareable.insert(*handle);
  }
  return kSuccess;
}
Result cuMemExportToShareableHandle(void* os_handle, AllocationHandle handle, int type,
                                    unsigned long long) {
  const std::lock_guard lock(state().mutex);
  const auto it = state().handles.find(handle);
  if (it == state().handles.end() || type != kHandleTypePosixFd) return kInvalidValue;
  *static_cast<int*>(os_handle) = ::fcntl(it->second, F_DUPFD_CLOEXEC, 0);
  return kSuccess;
}
Result cuMemImportFromShareableHandle(AllocationHandle* handle, void* os_handle, int type) {
  const std::lock_guard lock(state().mutex);
  const int fd =
      ::fcntl(static_cast<int>(reinterpret_cast<intptr_t>(os_handle)), F_DUPFD_CLOEXEC, 0);
  if (fd < 0 || type != kHandleTypePosixFd) return kInvalidValue;
  // A descriptor of something else is no handle of the driver.
  if (!DeviceOf(fd).has_value()) {
    ::close(fd);
    return kInvalidValue;
  }
  *handle = state().next_handle++;
  state().handles[*handle] = fd;
  return kSuccess;
}
Result cuMemRelease(AllocationHandle handle) {
  const std::lock_guard lock(state().mutex);
  const auto it = state().handles.find(handle);
  if (it == state().handles.end()) return kInvalidValue;
  ::close(it->second);
  state().handles.erase(it);
  return kSuccess;
}
Result cuMemRetainAllocationHandle(AllocationHandle* handle, void* address) {
  const std::lock_guard lock(state().mutex);
  const auto* found = Find(reinterpret_cast<uint64_t>(address));
  if (found == nullptr || found->second.kind != Kind::kVmm) return kInvalidValue;
  *handle = state().next_handle++;
  state().handles[*handle] = ::fcntl(found->second.fd, F_DUPFD_CLOEXEC, 0);
  return kSuccess;
}
Result cuMemAddressReserve(DevicePointer* pointer, size_t bytes, size_t, DevicePointer,
                           unsigned long long) {
  void* const data = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return kOutOfMemory;
  *pointer = reinterpret_cast<uint64_t>(data);
  return kSuccess;
}
Result cuMemAddressFree(DevicePointer pointer, size_t bytes) {
  return ::munmap(reinterpret_cast<void*>(pointer), bytes) == 0 ? kSuccess : kInvalidValue;
}
Result cuMemMap(DevicePointer pointer, size_t bytes, size_t, AllocationHandle handle,
                unsigned long long) {
  const std::lock_guard lock(state().mutex);
  const auto it = state().handles.find(handle);
  struct stat info;
  if (it == state().handles.end() || ::fstat(it->second, &info) != 0 ||
      static_cast<uint64_t>(info.st_size) < bytes) {
    return kInvalidValue;
  }
  void* const data = ::mmap(reinterpret_cast<void*>(pointer), bytes, PROT_NONE,
                            MAP_SHARED | MAP_FIXED, it->second, 0);
  if (data == MAP_FAILED) return kMapFailed;
  state().mapped[pointer] = {Kind::kVmm,
                             DeviceOf(it->second).value_or(0),
                             ::fcntl(it->second, F_DUPFD_CLOEXEC, 0),
                             bytes,
                             state().next_serial++,
                             {},
                             handle};
  return kSuccess;
}
Result cuMemSetAccess(DevicePointer pointer, size_t bytes, const AccessDescriptor* access, size_t) {
  if (access->flags == kAccessRead && std::getenv("KEEPSET_FAKE_NO_READ_ONLY") != nullptr) {
    return kNotSupported;
  }
  const int protection = access->flags == kAccessReadWrite ? PROT_READ | PROT_WRITE : PROT_READ;
  return ::mprotect(reinterpret_cast<void*>(pointer), bytes, protection) == 0 ? kSuccess
                                                                              : kInvalidValue;
}
Result cuMemUnmap(DevicePointer pointer, size_t bytes) {
  const std::lock_guard lock(state().mutex);
  const auto it = state().mapped.find(pointer);
  if (it == state().mapped.end() || it->second.kind != Kind::kVmm) return kInvalidValue;
  FinishUploads();
  ::close(it->second.fd);
  state().mapped.erase(it);
  void* const data = ::mmap(reinterpret_cast<void*>(pointer), bytes, PROT_NONE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  return data == MAP_FAILED ? kInvalidValue : kSuccess;
}

}  // extern "C"
