// The few functions of the CUDA runtime that the backend calls, on host memory. Work queued on a
// stream runs when the stream is waited for and not before, which is the latest a device may run
// it: whoever reads a result early, or frees memory that is still to be read, fails.
#ifndef KEEPSET_TESTS_KERNELS_CUDA_EMULATED_RUNTIME_H_
#define KEEPSET_TESTS_KERNELS_CUDA_EMULATED_RUNTIME_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace keepset::kernels::cuda {

// What the emulated device says it is, from now on; an sm_86 at first.
enum class EmulatedDevice {
  kSm86,
  kSm90,
  kSm90WithoutTensorMaps,  // with a driver that does not encode them
};
void SetEmulatedDevice(EmulatedDevice device);
// Shared memory that a block of it may have, at most.
int64_t EmulatedSharedBytes();

// Shared memory that launches of `function` may have now: 48 KiB until the attribute is set.
int64_t EmulatedSharedLimit(const void* function);
// Called once, by the next thread that has set such a limit and not launched yet.
void AfterNextSharedLimit(std::function<void()> work);

// Whether `stream`, which is not destroyed, is being captured into a graph, in the default mode,
// which concerns all threads.
enum class Capture { kOff, kOn };
void SetEmulatedCapture(cudaStream_t stream, Capture capture);
// Whether a call has spoiled the capture that is under way, or the last one: an allocation, a free,
// or a stream that is made, ended or waited for by a thread whose mode is not
// cudaStreamCaptureModeRelaxed; by any thread a use of the legacy stream (as if all captured
// streams were blocking ones), a wait for a captured stream, or one for the device.
bool IsEmulatedCaptureSpoiled();

cudaError_t QueueEmulated(cudaStream_t stream, std::function<void()> work);

// The next wait for a stream returns `error`, as do all calls after it when the error is sticky.
void FailNextWait(cudaError_t error);
// From now on every call fails with `error`, a sticky one. As with a fault that another library of
// the process has met, no thread's last error says so before its next call.
void FaultNow(cudaError_t error);
// From now on the runtime says that the memory at `data` is of another device; null: none is.
void PlaceElsewhere(const void* data);
// What the device has free from now on, as far as one allocation is concerned.
void LimitEmulatedMemory(size_t largest_block);
// Whether there is page-locked memory from now on.
enum class HostMemory { kPlenty, kNone };
void LimitEmulatedHostMemory(HostMemory memory);
// The next allocation finds no memory.
void FailNextAllocation();
// Blocks of device memory that are allocated now.
int64_t NumDeviceAllocations();

// What the host did since the process began.
struct EmulatedCounts {
  int64_t launches = 0;  // of kernels
  int64_t waits = 0;     // for a stream
  // wgmma of the second and the third warp group of all blocks: those that do mathematics.
  int64_t products[2] = {};
  int64_t allocations = 0;  // cudaMalloc
  int64_t frees = 0;        // cudaFree
  int64_t host_allocations = 0;
};
EmulatedCounts CountsSoFar();
// What the launch is to return.
cudaError_t CountLaunch();

// The launch after `launches` more ones returns `error` and queues nothing.
void FailLaunchAfter(int64_t launches, cudaError_t error);
void CountProducts(int warp_group, int64_t count);

// What backends that are made from now on find. Versions as the runtime counts: 13000 is 13.0.
enum class Mps { kOff, kOn };
void DescribeEmulatedDevice(const std::string& name, Mps mps, int driver_version);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_TESTS_KERNELS_CUDA_EMULATED_RUNTIME_H_
