// The part of the CUDA driver's binary interface that is resolved at run time, declared here so
// that a build needs no CUDA toolkit, and its lookup in the driver's library. Names and values are
// those of NVIDIA's driver API reference; entry points carry their versioned symbol names.
#ifndef KEEPSET_BASE_CUDA_ABI_H_
#define KEEPSET_BASE_CUDA_ABI_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace keepset::cuda_abi {

using Result = int;
using Device = int;
using Context = void*;
using DevicePointer = unsigned long long;
using AllocationHandle = unsigned long long;
using Stream = void*;

inline constexpr Result kSuccess = 0;
inline constexpr Result kInvalidValue = 1;
inline constexpr Result kOutOfMemory = 2;
inline constexpr Result kDeviceUnavailable = 46;
inline constexpr Result kNoDevice = 100;
inline constexpr Result kInvalidDevice = 101;
inline constexpr Result kDeviceNotLicensed = 102;
inline constexpr Result kInvalidContext = 201;
inline constexpr Result kMapFailed = 205;
inline constexpr Result kAlreadyMapped = 208;
inline constexpr Result kPeerAccessUnsupported = 217;
inline constexpr Result kOperatingSystem = 304;
inline constexpr Result kInvalidHandle = 400;
inline constexpr Result kNotFound = 500;
inline constexpr Result kTooManyPeers = 711;
inline constexpr Result kNotPermitted = 800;
inline constexpr Result kNotSupported = 801;
inline constexpr Result kSystemNotReady = 802;
inline constexpr Result kSystemDriverMismatch = 803;
inline constexpr Result kCompatNotSupportedOnDevice = 804;
inline constexpr Result kMpsConnectionFailed = 805;
inline constexpr Result kMpsRpcFailure = 806;
inline constexpr Result kMpsServerNotReady = 807;
inline constexpr Result kMpsMaxClientsReached = 808;
inline constexpr Result kMpsMaxConnectionsReached = 809;
inline constexpr Result kUnknown = 999;

// Whether after this error nothing works any more in the context or the process, whatever is
// called: only a new process helps. Of a Result and of the runtime's cudaError_t, which has the
// same values for these. kUnknown is not among them: an import says so of a process that has ended;
// who calls nothing of the kind may count it.
constexpr bool IsLost(Result result) {
  switch (result) {
    case 3:    // not initialized: the process is a fork of one that was, and never can be
    case 4:    // deinitialized: the driver has ended, as it does with the process
    case 201:  // invalid context: somebody has destroyed the one that everything of ours is in
    case 214:  // uncorrectable memory error: the context's memory cannot be trusted
    case 220:  // uncorrectable NVLink error: as 214, of what another device holds
    case 226:  // contained memory error: the contexts that it reached have ended
    case 700:  // illegal address: 700 to 721 are faults of a kernel, which end its context
    case 702:  // launch timeout
    case 709:  // context is destroyed: as 201, found by a call that was under way
    case 710:  // assert
    case 714:  // hardware stack error
    case 715:  // illegal instruction
    case 716:  // misaligned address
    case 717:  // invalid address space
    case 718:  // invalid program counter
    case 719:  // launch failure
    case 721:  // tensor memory leak
    case 810:  // MPS client terminated: the server has ended the process's contexts
    case 911:  // external device: a fault of another device, which ends the context
      return true;
    default:
      return false;
  }
}

struct Uuid {
  unsigned char bytes[16];
};
// As the vendor's tools print a whole device's: "GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx". Each
// MIG instance has its own.
std::string UuidText(const Uuid& uuid);
// Whether both name one device: tools print the UUID of a MIG instance with "MIG-" instead of
// "GPU-".
bool IsSameDevice(absl::string_view uuid, absl::string_view other);

struct IpcHandle {
  unsigned char reserved[64];
};
inline constexpr unsigned int kIpcLazyEnablePeerAccess = 1;
inline constexpr unsigned int kStreamNonBlocking = 1;  // waits for no other stream

inline constexpr int kDeviceAttributeUnifiedAddressing = 41;
inline constexpr int kDeviceAttributeVmmSupported = 102;
inline constexpr int kDeviceAttributePosixFdSupported = 103;
inline constexpr int kDeviceAttributeIpcSupported =
    125;  // named after events, meant for all of IPC
inline constexpr int kDeviceAttributeMpsEnabled = 133;

inline constexpr int kHandleTypePosixFd = 1;
inline constexpr int kLocationTypeDevice = 1;
inline constexpr int kAccessRead = 1;
inline constexpr int kAccessReadWrite = 3;
struct Location {
  int type;
  int id;
};
struct AccessDescriptor {
  Location location;
  int flags;
};
inline constexpr int kAllocationTypePinned = 1;  // stays on its device
// CUmemAllocationProp.
struct AllocationProperties {
  int type = kAllocationTypePinned;
  int handle_types = kHandleTypePosixFd;
  Location location = {kLocationTypeDevice, 0};
  void* windows_only = nullptr;
  unsigned char flags[8] = {};
};
static_assert(sizeof(AllocationProperties) == 32);
inline constexpr int kGranularityMinimum = 0;
// Plain allocations of whole granules share no block with others, which an IPC handle would expose;
// VMM allocations are whole granules.
inline constexpr uint64_t kAllocationGranularity = uint64_t{2} << 20;

inline constexpr int kPointerAttributeMemoryType = 2;
inline constexpr int kPointerAttributeBufferId =
    7;  // tells allocations apart for the life of a process
inline constexpr int kPointerAttributeDeviceOrdinal = 9;
inline constexpr int kPointerAttributeIsLegacyIpcCapable = 10;
inline constexpr int kPointerAttributeAllowedHandleTypes = 14;
inline constexpr unsigned int kMemoryTypeDevice = 2;

// KEEPSET_CUDA_ENTRY(member, symbol, parameters)
#define KEEPSET_CUDA_SHARED_ENTRIES(KEEPSET_CUDA_ENTRY)                                       \
  KEEPSET_CUDA_ENTRY(init, "cuInit", (unsigned int flags))                                    \
  KEEPSET_CUDA_ENTRY(error_name, "cuGetErrorName", (Result error, const char** name))         \
  KEEPSET_CUDA_ENTRY(device_get, "cuDeviceGet", (Device * device, int ordinal))               \
  KEEPSET_CUDA_ENTRY(device_get_uuid, "cuDeviceGetUuid_v2", (Uuid * uuid, Device device))     \
  KEEPSET_CUDA_ENTRY(primary_retain, "cuDevicePrimaryCtxRetain", (Context * context, Device)) \
  KEEPSET_CUDA_ENTRY(primary_release, "cuDevicePrimaryCtxRelease_v2", (Device device))        \
  KEEPSET_CUDA_ENTRY(context_push, "cuCtxPushCurrent_v2", (Context context))                  \
  KEEPSET_CUDA_ENTRY(context_pop, "cuCtxPopCurrent_v2", (Context * context))                  \
  KEEPSET_CUDA_ENTRY(address_range, "cuMemGetAddressRange_v2",                                \
                     (DevicePointer * base, size_t * bytes, DevicePointer pointer))           \
  KEEPSET_CUDA_ENTRY(pointer_attribute, "cuPointerGetAttribute",                              \
                     (void* data, int attribute, DevicePointer pointer))                      \
  KEEPSET_CUDA_ENTRY(release, "cuMemRelease", (AllocationHandle handle))

// What maps the memory of another process.
#define KEEPSET_CUDA_IMPORT_ENTRIES(KEEPSET_CUDA_ENTRY)                                            \
  KEEPSET_CUDA_SHARED_ENTRIES(KEEPSET_CUDA_ENTRY)                                                  \
  KEEPSET_CUDA_ENTRY(device_get_count, "cuDeviceGetCount", (int* count))                           \
  KEEPSET_CUDA_ENTRY(device_get_name, "cuDeviceGetName", (char* name, int length, Device device))  \
  KEEPSET_CUDA_ENTRY(device_attribute, "cuDeviceGetAttribute",                                     \
                     (int* value, int attribute, Device device))                                   \
  KEEPSET_CUDA_ENTRY(ipc_open, "cuIpcOpenMemHandle_v2",                                            \
                     (DevicePointer * pointer, IpcHandle handle, unsigned int flags))              \
  KEEPSET_CUDA_ENTRY(ipc_close, "cuIpcCloseMemHandle", (DevicePointer pointer))                    \
  KEEPSET_CUDA_ENTRY(import_handle, "cuMemImportFromShareableHandle",                              \
                     (AllocationHandle * handle, void* os_handle, int type))                       \
  KEEPSET_CUDA_ENTRY(address_reserve, "cuMemAddressReserve",                                       \
                     (DevicePointer * pointer, size_t bytes, size_t alignment, DevicePointer hint, \
                      unsigned long long flags))                                                   \
  KEEPSET_CUDA_ENTRY(address_free, "cuMemAddressFree", (DevicePointer pointer, size_t bytes))      \
  KEEPSET_CUDA_ENTRY(map, "cuMemMap",                                                              \
                     (DevicePointer pointer, size_t bytes, size_t offset, AllocationHandle handle, \
                      unsigned long long flags))                                                   \
  KEEPSET_CUDA_ENTRY(unmap, "cuMemUnmap", (DevicePointer pointer, size_t bytes))                   \
  KEEPSET_CUDA_ENTRY(                                                                              \
      set_access, "cuMemSetAccess",                                                                \
      (DevicePointer pointer, size_t bytes, const AccessDescriptor* access, size_t count))

// What shares the memory of this process.
#define KEEPSET_CUDA_EXPORT_ENTRIES(KEEPSET_CUDA_ENTRY)                                         \
  KEEPSET_CUDA_SHARED_ENTRIES(KEEPSET_CUDA_ENTRY)                                               \
  KEEPSET_CUDA_ENTRY(ipc_get, "cuIpcGetMemHandle", (IpcHandle * handle, DevicePointer pointer)) \
  KEEPSET_CUDA_ENTRY(retain_handle, "cuMemRetainAllocationHandle",                              \
                     (AllocationHandle * handle, void* address))                                \
  KEEPSET_CUDA_ENTRY(                                                                           \
      export_handle, "cuMemExportToShareableHandle",                                            \
      (void* os_handle, AllocationHandle handle, int type, unsigned long long flags))

// What makes memory of this process that others map. The stream is for filling it.
#define KEEPSET_CUDA_ALLOCATE_ENTRIES(KEEPSET_CUDA_ENTRY)                                       \
  KEEPSET_CUDA_ENTRY(allocate, "cuMemAlloc_v2", (DevicePointer * pointer, size_t bytes))        \
  KEEPSET_CUDA_ENTRY(free, "cuMemFree_v2", (DevicePointer pointer))                             \
  KEEPSET_CUDA_ENTRY(ipc_get, "cuIpcGetMemHandle", (IpcHandle * handle, DevicePointer pointer)) \
  KEEPSET_CUDA_ENTRY(granularity, "cuMemGetAllocationGranularity",                              \
                     (size_t * bytes, const AllocationProperties* properties, int option))      \
  KEEPSET_CUDA_ENTRY(create, "cuMemCreate",                                                     \
                     (AllocationHandle * handle, size_t bytes,                                  \
                      const AllocationProperties* properties, unsigned long long flags))        \
  KEEPSET_CUDA_ENTRY(                                                                           \
      export_handle, "cuMemExportToShareableHandle",                                            \
      (void* os_handle, AllocationHandle handle, int type, unsigned long long flags))           \
  KEEPSET_CUDA_ENTRY(stream_create, "cuStreamCreate", (Stream * stream, unsigned int flags))    \
  KEEPSET_CUDA_ENTRY(stream_destroy, "cuStreamDestroy_v2", (Stream stream))                     \
  KEEPSET_CUDA_ENTRY(stream_synchronize, "cuStreamSynchronize", (Stream stream))                \
  KEEPSET_CUDA_ENTRY(fill, "cuMemsetD8Async",                                                   \
                     (DevicePointer pointer, unsigned char value, size_t bytes, Stream stream))

#define KEEPSET_CUDA_MEMBER(member, symbol, parameters) Result(*member) parameters = nullptr;
struct ImportApi {
  KEEPSET_CUDA_IMPORT_ENTRIES(KEEPSET_CUDA_MEMBER)
};
struct ExportApi {
  KEEPSET_CUDA_EXPORT_ENTRIES(KEEPSET_CUDA_MEMBER)
};
struct AllocateApi {
  KEEPSET_CUDA_ALLOCATE_ENTRIES(KEEPSET_CUDA_MEMBER)
};
#undef KEEPSET_CUDA_MEMBER

// Opens `library` (a path, or a name that the loader searches) for the life of the process and
// looks up every entry point. NotFound: no such library. FailedPrecondition: it lacks an entry
// point. Thread-safe.
absl::StatusOr<ImportApi> LoadImportApi(const std::string& library);
absl::StatusOr<ExportApi> LoadExportApi(const std::string& library);
absl::StatusOr<AllocateApi> LoadAllocateApi(const std::string& library);

// "CUDA_ERROR_INVALID_VALUE (1)", or "error 1" where the driver knows no name.
template <typename Api>
std::string ErrorText(const Api& api, Result result) {
  const char* name = nullptr;
  if (api.error_name(result, &name) != kSuccess || name == nullptr) {
    return absl::StrCat("error ", result);
  }
  return absl::StrCat(name, " (", result, ")");
}

}  // namespace keepset::cuda_abi

#endif  // KEEPSET_BASE_CUDA_ABI_H_
