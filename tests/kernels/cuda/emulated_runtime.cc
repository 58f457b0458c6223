#include "tests/kernels/cuda/emulated_runtime.h"

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/launch.h"
#include "tests/kernels/cuda/emulated_tensor_map.h"
#include "tests/kernels/cuda/guarded_memory.h"

struct CUstream_st {
  std::deque<std::function<void()>> work;
  int device = 0;
  bool is_captured = false;
};

namespace keepset::kernels::cuda {
namespace {

// The emulated device of this process.
struct Device {
  std::mutex mutex;
  std::map<uintptr_t, GuardedMemory> memory;       // by address
  std::map<uintptr_t, GuardedMemory> host_memory;  // page-locked
  std::map<const void*, int> shared_limits;        // by function
  std::set<cudaStream_t> streams;                  // not destroyed
  CUstream_st legacy_stream;
  std::vector<std::function<void()>> uploads;  // of pageable memory, staged
  std::function<void()> after_shared_limit;
  EmulatedDevice kind = EmulatedDevice::kSm86;
  const void* elsewhere = nullptr;
  size_t largest_block = size_t{1} << 40;
  bool next_allocation_fails = false;
  bool has_host_memory = true;
  cudaError_t next_wait = cudaSuccess;
  cudaError_t sticky = cudaSuccess;
  std::string name = "emulated";
  bool has_mps = false;
  int driver_version = 13000;
  int64_t failing_launch = 0;  // counted from 1
  cudaError_t launch_error = cudaSuccess;
  std::atomic<int64_t> captures = 0;  // under way
  std::atomic<bool> capture_is_spoiled = false;
  std::atomic<int64_t> launches = 0;
  std::atomic<int64_t> products[2] = {};
  std::atomic<int64_t> waits = 0;
  std::atomic<int64_t> allocations = 0;
  std::atomic<int64_t> frees = 0;
  std::atomic<int64_t> host_allocations = 0;
};

// Of a second device there is nothing but that it can be current.
thread_local int current_device = 0;
thread_local CUstream_st per_thread_stream;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

Device& TheDevice() {
  static auto* const device = new Device;
  return *device;
}

void* Allocate(size_t bytes, std::map<uintptr_t, GuardedMemory>& memory) {
  constexpr size_t kAlignment = 256;
  GuardedMemory made(bytes, kAlignment);
  void* const data = made.data();
  Device& device = TheDevice();
  const std::lock_guard<std::mutex> lock(device.mutex);
  memory.emplace(reinterpret_cast<uintptr_t>(data), std::move(made));
  return data;
}

// The stream that a handle means; null for one that is destroyed.
cudaStream_t Find(cudaStream_t stream) {
  Device& device = TheDevice();
  if (stream == nullptr || stream == cudaStreamLegacy) return &device.legacy_stream;
  if (stream == cudaStreamPerThread) return &per_thread_stream;
  const std::lock_guard<std::mutex> lock(device.mutex);
  return device.streams.contains(stream) ? stream : nullptr;
}

// cudaMemcpy of pageable memory to the device returns when the bytes are staged; they arrive behind
// what is on the legacy stream (CUDA Runtime API, "API synchronization behavior"), so that another
// stream finds them only after a wait for the device. Here they arrive as late as they may.
void FinishUploads() {
  std::vector<std::function<void()>> uploads;
  {
    const std::lock_guard<std::mutex> lock(TheDevice().mutex);
    uploads.swap(TheDevice().uploads);
  }
  for (const std::function<void()>& upload : uploads) upload();
}

void RunQueued(cudaStream_t stream) {
  if (stream == &TheDevice().legacy_stream) FinishUploads();
  while (!stream->work.empty()) {
    const std::function<void()> work = std::move(stream->work.front());
    stream->work.pop_front();
    work();
  }
}

cudaError_t Noted(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t State() { return Noted(TheDevice().sticky); }

// Of a call that no mode allows beside a capture.
cudaError_t Conflicting(cudaError_t error = cudaErrorStreamCaptureUnsupported) {
  if (TheDevice().captures == 0) return cudaSuccess;
  TheDevice().capture_is_spoiled = true;
  return Noted(error);
}

// Of a call that the manual calls potentially unsafe.
cudaError_t Unsafe() {
  return capture_mode == cudaStreamCaptureModeRelaxed ? cudaSuccess : Conflicting();
}

bool IsLegacy(cudaStream_t stream) { return stream == &TheDevice().legacy_stream; }

}  // namespace

cudaError_t QueueEmulated(cudaStream_t stream, std::function<void()> work) {
  if (State() != cudaSuccess) return State();
  stream = Find(stream);
  if (stream == nullptr || current_device != 0 || stream->device != 0) {
    return cudaErrorInvalidResourceHandle;
  }
  if (IsLegacy(stream)) {
    const cudaError_t error = Conflicting(cudaErrorStreamCaptureImplicit);
    if (error != cudaSuccess) return error;
  }
  // Into the graph, whatever it is.
  if (stream->is_captured) return cudaSuccess;
  stream->work.push_back(std::move(work));
  return cudaSuccess;
}

void SetEmulatedCapture(cudaStream_t stream, Capture capture) {
  Device& device = TheDevice();
  const bool is_on = capture == Capture::kOn;
  const bool was_on = std::exchange(Find(stream)->is_captured, is_on);
  if (is_on && device.captures == 0) device.capture_is_spoiled = false;
  device.captures += static_cast<int64_t>(is_on) - static_cast<int64_t>(was_on);
}

bool IsEmulatedCaptureSpoiled() { return TheDevice().capture_is_spoiled; }

void SetEmulatedDevice(EmulatedDevice device) { TheDevice().kind = device; }

int64_t EmulatedSharedBytes() {
  return int64_t{TheDevice().kind == EmulatedDevice::kSm86 ? 99 : 227} << 10;
}

int64_t EmulatedSharedLimit(const void* function) {
  Device& device = TheDevice();
  const std::lock_guard<std::mutex> lock(device.mutex);
  const auto found = device.shared_limits.find(function);
  return found == device.shared_limits.end() ? kSharedWithoutAsking : found->second;
}

void AfterNextSharedLimit(std::function<void()> work) {
  TheDevice().after_shared_limit = std::move(work);
}

EmulatedCounts CountsSoFar() {
  const Device& device = TheDevice();
  return {device.launches,    device.waits, {device.products[0], device.products[1]},
          device.allocations, device.frees, device.host_allocations};
}

void DescribeEmulatedDevice(const std::string& name, Mps mps, int driver_version) {
  Device& device = TheDevice();
  device.name = name;
  device.has_mps = mps == Mps::kOn;
  device.driver_version = driver_version;
}

cudaError_t CountLaunch() {
  Device& device = TheDevice();
  return ++device.launches == device.failing_launch ? device.launch_error : cudaSuccess;
}

void FailLaunchAfter(int64_t launches, cudaError_t error) {
  Device& device = TheDevice();
  device.failing_launch = device.launches + launches + 1;
  device.launch_error = error;
}

void CountProducts(int warp_group, int64_t count) {
  if (warp_group == 1 || warp_group == 2) TheDevice().products[warp_group - 1] += count;
}

void FailNextWait(cudaError_t error) { TheDevice().next_wait = error; }

void FaultNow(cudaError_t error) { TheDevice().sticky = error; }

void LimitEmulatedHostMemory(HostMemory memory) {
  TheDevice().has_host_memory = memory == HostMemory::kPlenty;
}

void FailNextAllocation() { TheDevice().next_allocation_fails = true; }

void LimitEmulatedMemory(size_t largest_block) { TheDevice().largest_block = largest_block; }

void PlaceElsewhere(const void* data) { TheDevice().elsewhere = data; }

int64_t NumDeviceAllocations() {
  Device& device = TheDevice();
  const std::lock_guard<std::mutex> lock(device.mutex);
  return static_cast<int64_t>(device.memory.size());
}

}  // namespace keepset::kernels::cuda

using keepset::kernels::cuda::Conflicting;
using keepset::kernels::cuda::EmulatedDevice;
using keepset::kernels::cuda::IsLegacy;
using keepset::kernels::cuda::IsStickyError;
using keepset::kernels::cuda::Noted;
using keepset::kernels::cuda::QueueEmulated;
using keepset::kernels::cuda::State;
using keepset::kernels::cuda::TheDevice;
using keepset::kernels::cuda::Unsafe;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  // As a driver that is too old does, the count is left as it was.
  if (TheDevice().driver_version < 12000) return cudaErrorInsufficientDriver;
  *count = 2;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device != 0 && device != 1) return cudaErrorInvalidDevice;
  keepset::kernels::cuda::current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = keepset::kernels::cuda::current_device;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  auto& device = TheDevice();
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize ||
      value > keepset::kernels::cuda::EmulatedSharedBytes()) {
    return cudaErrorInvalidValue;
  }
  std::function<void()> after;
  {
    const std::lock_guard<std::mutex> lock(device.mutex);
    device.shared_limits[function] = value;
    after = std::exchange(device.after_shared_limit, nullptr);
  }
  if (after) after();
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  return std::exchange(keepset::kernels::cuda::last_error, cudaSuccess);
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorIllegalAddress ? "cudaErrorIllegalAddress" : "cudaErrorEmulated";
}
const char* cudaGetErrorString(cudaError_t /*error*/) { return "emulated error"; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = TheDevice().kind == EmulatedDevice::kSm86 ? 8 : 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = TheDevice().kind == EmulatedDevice::kSm86 ? 6 : 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(keepset::kernels::cuda::EmulatedSharedBytes());
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      // Small, so that the KV heads of the tests are taken in several launches.
      *value = 64 << 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      // Few, so that a block has several tiles.
      *value = 3;
      return cudaSuccess;
    case cudaDevAttrMpsEnabled:
      *value = TheDevice().has_mps ? 1 : 0;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int /*device*/) {
  std::memset(properties, 0, sizeof(*properties));
  std::strcpy(properties->name, TheDevice().name.c_str());
  properties->totalGlobalMem = size_t{4} << 30;
  properties->major = TheDevice().kind == EmulatedDevice::kSm86 ? 8 : 9;
  properties->minor = TheDevice().kind == EmulatedDevice::kSm86 ? 6 : 0;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = TheDevice().driver_version;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function,
                                             unsigned /*version*/, unsigned long long /*flags*/,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool is_there = TheDevice().kind != EmulatedDevice::kSm90WithoutTensorMaps &&
                        std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = is_there ? reinterpret_cast<void*>(&keepset::kernels::cuda::EncodeEmulatedTensorMap)
                       : nullptr;
  *found = is_there ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned /*flags*/,
                                         int /*priority*/) {
  if (const cudaError_t error = Unsafe(); error != cudaSuccess) return error;
  *stream = new CUstream_st;
  (*stream)->device = keepset::kernels::cuda::current_device;
  auto& device = TheDevice();
  const std::lock_guard<std::mutex> lock(device.mutex);
  device.streams.insert(*stream);
  return State();
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (const cudaError_t error = Unsafe(); error != cudaSuccess) return error;
  auto& device = TheDevice();
  const std::lock_guard<std::mutex> lock(device.mutex);
  if (device.streams.erase(stream) == 0) return cudaErrorInvalidResourceHandle;
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device) {
  stream = keepset::kernels::cuda::Find(stream);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  *device = stream->device;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  stream = keepset::kernels::cuda::Find(stream);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (State() != cudaSuccess) return State();
  if (IsLegacy(stream) && TheDevice().captures != 0) return Noted(cudaErrorStreamCaptureImplicit);
  *status = stream->is_captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  auto& device = TheDevice();
  ++device.waits;
  if (State() != cudaSuccess) return State();
  stream = keepset::kernels::cuda::Find(stream);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  const cudaError_t refusal = stream->is_captured || IsLegacy(stream) ? Conflicting() : Unsafe();
  if (refusal != cudaSuccess) return refusal;
  keepset::kernels::cuda::RunQueued(stream);
  const cudaError_t error = std::exchange(device.next_wait, cudaSuccess);
  if (IsStickyError(error)) device.sticky = error;
  return error;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  *mode = std::exchange(keepset::kernels::cuda::capture_mode, *mode);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (State() != cudaSuccess) return State();
  stream = keepset::kernels::cuda::Find(stream);
  if (stream == nullptr) return Noted(cudaErrorInvalidResourceHandle);
  const cudaError_t refusal = stream->is_captured || IsLegacy(stream) ? Conflicting() : Unsafe();
  if (refusal != cudaSuccess) return refusal;
  return stream->work.empty() ? cudaSuccess : Noted(cudaErrorNotReady);
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* all_bytes) {
  auto& device = TheDevice();
  const std::lock_guard<std::mutex> lock(device.mutex);
  *free_bytes = device.largest_block;
  for (const auto& [address, allocation] : device.memory) *free_bytes -= allocation.bytes();
  *all_bytes = 2 * device.largest_block;
  return State();
}
cudaError_t cudaMalloc(void** data, size_t bytes) {
  if (const cudaError_t error = Unsafe(); error != cudaSuccess) return error;
  ++TheDevice().allocations;
  const bool fails = std::exchange(TheDevice().next_allocation_fails, false);
  if (fails || bytes > TheDevice().largest_block) return Noted(cudaErrorMemoryAllocation);
  if (State() != cudaSuccess) return State();
  *data = keepset::kernels::cuda::Allocate(bytes, TheDevice().memory);
  return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
  if (const cudaError_t error = Unsafe(); error != cudaSuccess) return error;
  keepset::kernels::cuda::FinishUploads();
  auto& device = TheDevice();
  ++device.frees;
  const std::lock_guard<std::mutex> lock(device.mutex);
  const auto found = device.memory.find(reinterpret_cast<uintptr_t>(data));
  if (found == device.memory.end()) return cudaErrorInvalidValue;
  device.memory.erase(found);
  return State();
}
cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned /*flags*/) {
  if (const cudaError_t error = Unsafe(); error != cudaSuccess) return error;
  if (!TheDevice().has_host_memory) return cudaErrorMemoryAllocation;
  ++TheDevice().host_allocations;
  *data = keepset::kernels::cuda::Allocate(bytes, TheDevice().host_memory);
  return State();
}
cudaError_t cudaFreeHost(void* data) {
  if (const cudaError_t error = Unsafe(); error != cudaSuccess) return error;
  auto& device = TheDevice();
  const std::lock_guard<std::mutex> lock(device.mutex);
  const auto found = device.host_memory.find(reinterpret_cast<uintptr_t>(data));
  if (found == device.host_memory.end()) return cudaErrorInvalidValue;
  device.host_memory.erase(found);
  return State();
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (const cudaError_t error = Conflicting(); error != cudaSuccess) return error;
  if (kind == cudaMemcpyHostToDevice) {
    const auto* const first = static_cast<const std::byte*>(from);
    auto& device = TheDevice();
    const std::lock_guard<std::mutex> lock(device.mutex);
    device.uploads.emplace_back([to, staged = std::vector<std::byte>(first, first + bytes)] {
      std::memcpy(to, staged.data(), staged.size());
    });
    return State();
  }
  keepset::kernels::cuda::FinishUploads();
  std::memcpy(to, from, bytes);
  return State();
}
cudaError_t cudaDeviceSynchronize() {
  if (const cudaError_t error = Conflicting(); error != cudaSuccess) return error;
  keepset::kernels::cuda::FinishUploads();
  return State();
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind /*kind*/,
                            cudaStream_t stream) {
  return QueueEmulated(stream, [=] { std::memcpy(to, from, bytes); });
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind /*kind*/,
                              cudaStream_t stream) {
  return QueueEmulated(stream, [=] {
    for (size_t row = 0; row < height; ++row) {
      std::memcpy(static_cast<std::byte*>(to) + row * to_pitch,
                  static_cast<const std::byte*>(from) + row * from_pitch, width);
    }
  });
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  return QueueEmulated(stream, [=] { std::memset(data, value, bytes); });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  auto& device = TheDevice();
  const std::lock_guard<std::mutex> lock(device.mutex);
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = device.memory.upper_bound(address);
  attributes->type = cudaMemoryTypeUnregistered;
  attributes->device = pointer != nullptr && pointer == device.elsewhere ? 1 : 0;
  if (after != device.memory.begin()) {
    --after;
    if (address < after->first + after->second.bytes()) attributes->type = cudaMemoryTypeDevice;
  }
  return cudaSuccess;
}

}  // extern "C"
