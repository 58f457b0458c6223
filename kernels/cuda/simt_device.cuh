// The machine that kernels run on: threads, collectives and instructions of sm_80 and later. The
// emulator of the tests has the same members.
#ifndef KEEPSET_KERNELS_CUDA_SIMT_DEVICE_CUH_
#define KEEPSET_KERNELS_CUDA_SIMT_DEVICE_CUH_

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/launch.h"
#include "kernels/views.h"

namespace keepset::kernels::cuda {

extern __shared__ __align__(16) unsigned char keepset_shared_memory[];

class DeviceThread {
 public:
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int num_threads() const { return static_cast<int>(blockDim.x); }
  __device__ int lane() const { return static_cast<int>(threadIdx.x) & 31; }
  __device__ int warp() const { return static_cast<int>(threadIdx.x) >> 5; }
  __device__ int num_warps() const { return static_cast<int>(blockDim.x) >> 5; }
  __device__ int block_x() const { return static_cast<int>(blockIdx.x); }
  __device__ int block_y() const { return static_cast<int>(blockIdx.y); }
  __device__ int block_z() const { return static_cast<int>(blockIdx.z); }
  __device__ int grid_x() const { return static_cast<int>(gridDim.x); }
  __device__ int grid_y() const { return static_cast<int>(gridDim.y); }

  // Aligned to 16 bytes.
  __device__ std::byte* shared() const {
    return reinterpret_cast<std::byte*>(keepset_shared_memory);
  }
  __device__ void SyncBlock() const { __syncthreads(); }

  // Warp collectives: all 32 lanes take part.
  template <typename T>
  __device__ T ShuffleXor(T value, int mask) const {
    return __shfl_xor_sync(~0u, value, mask);
  }
  template <typename T>
  __device__ T ShuffleFrom(T value, int lane) const {
    return __shfl_sync(~0u, value, lane);
  }
  __device__ uint32_t Ballot(bool vote) const { return __ballot_sync(~0u, vote); }
  // The lanes that hold the same value.
  __device__ uint32_t MatchAny(uint32_t value) const { return __match_any_sync(~0u, value); }

  // 16 bytes from global to shared memory in the background; zeros when not `valid` (`from` is not
  // read, but must be a pointer into memory).
  __device__ void CopyAsync16(std::byte* to, const std::byte* from, bool valid) const {
    const uint32_t address = SharedAddress(to);
    const int source_bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from),
                 "r"(source_bytes)
                 : "memory");
  }
  __device__ void CommitCopies() const { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
  // All but the newest `kNewest` groups of this thread have arrived.
  template <int kNewest>
  __device__ void WaitCopies() const {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kNewest) : "memory");
  }

  // Four 8x8 matrices of 16-bit elements: lane 8 * i + j names row j of matrix i.
  __device__ void LoadMatrix4(uint32_t* out, const std::byte* row) const {
    const uint32_t address = SharedAddress(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
  // c += a b, m16n8k16, a row-major, b column-major.
  template <DType kType>
  __device__ void Mma(float& c0, float& c1, float& c2, float& c3, const uint32_t* a, uint32_t b0,
                      uint32_t b1) const {
    if constexpr (kType == DType::kBF16) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
          "{%8, %9}, {%0, %1, %2, %3};\n"
          : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
          "{%8, %9}, {%0, %1, %2, %3};\n"
          : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
  }

  // Global memory, of which a read is the only one for a while: T has 16, 8, 4 or 2 bytes and is
  // aligned so. Of pointers that were read from memory nobody else knows that they are global.
  template <typename T>
  __device__ T LoadOnce(const T* from) const {
    using Word = GlobalWord<sizeof(T)>;
    const Word word = __ldcs(reinterpret_cast<const Word*>(from));
    return reinterpret_cast<const T&>(word);
  }
  template <typename T>
  __device__ void StoreGlobal(T* to, const T& value) const {
    __builtin_assume(__isGlobal(to));
    *to = value;
  }

  // 2^x; 0 for -inf.
  __device__ float Exp2(float x) const {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
  }
  __device__ float Log2(float x) const { return log2f(x); }
  __device__ double Log(double x) const { return log(x); }
  __device__ float Max(float a, float b) const { return fmaxf(a, b); }
  __device__ float Sqrt(float x) const { return __fsqrt_rn(x); }
  __device__ double Sqrt(double x) const { return __dsqrt_rn(x); }
  // Rounded one by one: the compiler must not contract them into a fused multiply-add.
  __device__ float Mul(float a, float b) const { return __fmul_rn(a, b); }
  __device__ float Add(float a, float b) const { return __fadd_rn(a, b); }
  __device__ float Div(float a, float b) const { return __fdiv_rn(a, b); }
  __device__ double Add(double a, double b) const { return __dadd_rn(a, b); }
  __device__ double Mul(double a, double b) const { return __dmul_rn(a, b); }
  __device__ double Div(double a, double b) const { return __ddiv_rn(a, b); }

  __device__ void AddShared(uint32_t* to, uint32_t value) const { atomicAdd(to, value); }
  __device__ void MinShared(uint32_t* to, uint32_t value) const { atomicMin(to, value); }
  __device__ void MinGlobal(uint64_t* to, uint64_t value) const {
    atomicMin(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
  }

 private:
  template <int kBytes>
  using GlobalWord = std::conditional_t<
      kBytes == 16, uint4,
      std::conditional_t<kBytes == 8, uint2,
                         std::conditional_t<kBytes == 4, unsigned int, unsigned short>>>;

  __device__ static uint32_t SharedAddress(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
  }
};

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kMaxThreads, Kernel::kMinBlocksPerMultiprocessor)
    RunKernel(const __grid_constant__ typename Kernel::Params params) {
  DeviceThread thread;
  Kernel::Run(thread, params);
}

template <typename Kernel>
cudaError_t Launch(const LaunchShape& shape, const typename Kernel::Params& params,
                   cudaStream_t stream) {
  if (shape.grid_x == 0 || shape.grid_y == 0 || shape.grid_z == 0) return cudaSuccess;
  const auto* const function = reinterpret_cast<const void*>(&RunKernel<Kernel>);
  if (shape.shared_bytes > kSharedWithoutAsking) {
    const cudaError_t error = AllowMostShared(function);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(shape.grid_x), static_cast<unsigned>(shape.grid_y),
                  static_cast<unsigned>(shape.grid_z));
  void* arguments[] = {const_cast<typename Kernel::Params*>(&params)};
  return cudaLaunchKernel(function, grid, dim3(static_cast<unsigned>(shape.threads)), arguments,
                          static_cast<size_t>(shape.shared_bytes), stream);
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_SIMT_DEVICE_CUH_
