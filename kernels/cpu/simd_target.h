// Which SIMD target the vectorised loops of the CPU backend run on. Thread-safe.
#ifndef KEEPSET_KERNELS_CPU_SIMD_TARGET_H_
#define KEEPSET_KERNELS_CPU_SIMD_TARGET_H_

namespace keepset::kernels::cpu {

// "avx512", "avx2", "sse4", ...: the target that this machine uses.
const char* SimdTargetName();

}  // namespace keepset::kernels::cpu

#endif  // KEEPSET_KERNELS_CPU_SIMD_TARGET_H_
