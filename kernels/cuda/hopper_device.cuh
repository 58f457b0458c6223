// The machine of the kernels that use Hopper's own instructions (sm_90a): TMA loads, mbarriers,
// named barriers and register shares of warp groups. wgmma is in hopper_wgmma.cuh. The emulator of
// the tests (tests/kernels/cuda/hopper_emulator.h) has the same members.
#ifndef KEEPSET_KERNELS_CUDA_HOPPER_DEVICE_CUH_
#define KEEPSET_KERNELS_CUDA_HOPPER_DEVICE_CUH_

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/hopper_wgmma.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/simt_device.cuh"
#include "kernels/views.h"

namespace keepset::kernels::cuda {

class HopperThread : public DeviceThread {
 public:
  // Address in the shared window, as descriptors and the alignment of tiles take it.
  __device__ uint32_t SharedAddress(const void* pointer) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
  }

  // One thread sets barriers up, makes them visible to the other threads and to TMA, and then the
  // block meets. A phase ends when `arrivals` threads have arrived and all expected bytes have.
  __device__ void InitBarrier(uint64_t* barrier, int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(SharedAddress(barrier)),
                 "r"(arrivals)
                 : "memory");
  }
  __device__ void FenceBarriers() const {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
    FenceAsyncProxy();
  }
  __device__ void Arrive(uint64_t* barrier) const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(SharedAddress(barrier))
                 : "memory");
  }
  // Arrives, and lets the phase wait for so many more bytes of loads.
  __device__ void ArriveAndExpect(uint64_t* barrier, int bytes) const {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(SharedAddress(barrier)),
        "r"(bytes)
        : "memory");
  }
  // Until the phase of this parity is over; of a new barrier the phase before the first (parity 1)
  // is. What it waits for is queued by this block alone, so that it ends soon: never to end would
  // be a mistake of the kernel, which is a trap (an error of the launch) instead of a stuck device.
  __device__ void WaitPhase(uint64_t* barrier, uint32_t parity) const {
    const uint32_t address = SharedAddress(barrier);
    if (IsPhaseOver(address, parity)) return;
    constexpr uint64_t kMostNanoseconds = 2'000'000'000;
    const uint64_t begin = GlobalNanoseconds();
    KEEPSET_NO_UNROLL
    while (!IsPhaseOver(address, parity)) {
      if (GlobalNanoseconds() - begin > kMostNanoseconds) __trap();
    }
  }

  // Has a map at hand before its first load. map: in kernel parameters.
  __device__ void PrefetchMap(const CUtensorMap& map) const {
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
  }
  // A box of a tensor of rank 3 or 4 into shared memory, by one thread; its bytes are counted on
  // `barrier`. to: aligned to 1024 bytes (128-byte swizzle). map: in kernel parameters.
  __device__ void LoadBox(std::byte* to, const CUtensorMap& map, int c0, int c1, int c2,
                          uint64_t* barrier) const {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5}], [%2];\n" ::"r"(SharedAddress(to)),
        "l"(reinterpret_cast<uint64_t>(&map)), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1),
        "r"(c2)
        : "memory");
  }
  __device__ void LoadBox(std::byte* to, const CUtensorMap& map, int c0, int c1, int c2, int c3,
                          uint64_t* barrier) const {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(SharedAddress(to)),
        "l"(reinterpret_cast<uint64_t>(&map)), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1),
        "r"(c2), "r"(c3)
        : "memory");
  }
  // Between this thread's writes to shared memory and their use by wgmma or TMA.
  __device__ void FenceAsyncProxy() const {
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
  }

  // The lanes of a warp meet.
  __device__ void SyncWarp() const { __syncwarp(); }
  // Named barriers 1 to 15: `threads` threads, whole warps, meet; those that only arrive go on.
  __device__ void SyncNamed(int id, int threads) const {
    asm volatile("barrier.cta.sync.aligned %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
  }
  __device__ void ArriveNamed(int id, int threads) const {
    asm volatile("barrier.cta.arrive.aligned %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
  }

  // The whole warp group gives registers back, or takes some that others gave.
  template <int kRegisters>
  __device__ void ShrinkRegisters() const {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
  }
  template <int kRegisters>
  __device__ void GrowRegisters() const {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
  }

  // wgmma, by the four warps of a group in step. d: the group's share of a 64 x kColumns tile of
  // fp32; thread t of the group holds, with l = t % 32, in d[4 j + 2 r + i] row 16 (t / 32) + l / 4
  // + 8 r, column 8 j + 2 (l % 4) + i. a, b: descriptors of 64 and kColumns rows of 16 elements.
  // d is touched by nothing else from FenceMma to WaitMma.
  template <int kCount>
  __device__ void FenceMma(float (&d)[kCount]) const {
    KEEPSET_UNROLL
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
  }
  template <DType kType, int kColumns>
  __device__ void MmaAsync(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool adds) const {
    Wgmma<kType>(d, a, b, adds ? 1 : 0);
  }
  __device__ void CommitMma() const {
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
  }
  // All products have been added; the registers are named so that no read moves before the wait.
  template <int kCount>
  __device__ void WaitMma(float (&d)[kCount]) const {
    asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory");
    KEEPSET_UNROLL
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
  }

 private:
  // Tries for a while that the device chooses.
  __device__ static bool IsPhaseOver(uint32_t barrier, uint32_t parity) {
    uint32_t is_over;
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}\n"
        : "=r"(is_over)
        : "r"(barrier), "r"(parity)
        : "memory");
    return is_over != 0;
  }
  __device__ static uint64_t GlobalNanoseconds() {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;\n" : "=l"(time));
    return time;
  }
};

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    RunHopperKernel(const __grid_constant__ typename Kernel::Params params) {
  HopperThread thread;
  Kernel::Run(thread, params);
}

template <typename Kernel>
cudaError_t LaunchHopper(const LaunchShape& shape, const typename Kernel::Params& params,
                         cudaStream_t stream) {
  const auto* const function = reinterpret_cast<const void*>(&RunHopperKernel<Kernel>);
  const cudaError_t error = AllowMostShared(function);
  if (error != cudaSuccess) return error;
  void* arguments[] = {const_cast<typename Kernel::Params*>(&params)};
  return cudaLaunchKernel(function, dim3(static_cast<unsigned>(shape.grid_x)),
                          dim3(static_cast<unsigned>(shape.threads)), arguments,
                          static_cast<size_t>(shape.shared_bytes), stream);
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_HOPPER_DEVICE_CUH_
