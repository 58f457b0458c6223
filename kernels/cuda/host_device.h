// Marks arithmetic that both the host and the device compile. Kernels are written once, as
// templates over the machine that runs them (simt_device.cuh, or the emulator of the tests), so
// that their index arithmetic, barriers and collectives are tested without a device.
#ifndef KEEPSET_KERNELS_CUDA_HOST_DEVICE_H_
#define KEEPSET_KERNELS_CUDA_HOST_DEVICE_H_

#if defined(__CUDACC__)
#define KEEPSET_HD __host__ __device__
#define KEEPSET_KERNEL_BODY __device__
#define KEEPSET_UNROLL _Pragma("unroll")
#define KEEPSET_NO_UNROLL _Pragma("unroll 1")
#else
#define KEEPSET_HD
#define KEEPSET_KERNEL_BODY
#define KEEPSET_UNROLL
#define KEEPSET_NO_UNROLL
#endif

#endif  // KEEPSET_KERNELS_CUDA_HOST_DEVICE_H_
