// wgmma.mma_async m64nNk16 with fp32 accumulators, both operands in shared memory, K-major, for N
// of 64, 128 and 256.
#ifndef KEEPSET_KERNELS_CUDA_HOPPER_WGMMA_CUH_
#define KEEPSET_KERNELS_CUDA_HOPPER_WGMMA_CUH_

#include <cstdint>

#include "kernels/views.h"

namespace keepset::kernels::cuda {

// Operands %0 to %127 in rows of 32.
#define KEEPSET_WGMMA_D0                                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KEEPSET_WGMMA_D1                                                                       \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KEEPSET_WGMMA_D2                                                                       \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define KEEPSET_WGMMA_D3                                                                         \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "   \
  "%127"

#define KEEPSET_WGMMA_4(d, i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define KEEPSET_WGMMA_16(d, i)                                                     \
  KEEPSET_WGMMA_4(d, i), KEEPSET_WGMMA_4(d, (i) + 4), KEEPSET_WGMMA_4(d, (i) + 8), \
      KEEPSET_WGMMA_4(d, (i) + 12)
#define KEEPSET_WGMMA_32(d, i) KEEPSET_WGMMA_16(d, i), KEEPSET_WGMMA_16(d, (i) + 16)
#define KEEPSET_WGMMA_64(d, i) KEEPSET_WGMMA_32(d, i), KEEPSET_WGMMA_32(d, (i) + 32)

// The last operands: descriptors of a and b, whether d is added to, no negation, no transposition.
#define KEEPSET_WGMMA_TEXT(shape, types, registers, a, b, adds)                              \
  "{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds ", 0;\nwgmma.mma_async.sync.aligned." shape \
  ".f32." types " {" registers "}, " a ", " b ", adds, 1, 1, 0, 0;\n}\n"

#define KEEPSET_WGMMA_OVERLOAD(count, shape, registers, operands, a_name, b_name, adds_name)    \
  template <DType kType>                                                                        \
  __device__ inline void Wgmma(float(&d)[count], uint64_t a, uint64_t b, int adds) {            \
    if constexpr (kType == DType::kBF16) {                                                      \
      asm volatile(KEEPSET_WGMMA_TEXT(shape, "bf16.bf16", registers, a_name, b_name, adds_name) \
                   : operands                                                                   \
                   : "l"(a), "l"(b), "r"(adds));                                                \
    } else {                                                                                    \
      asm volatile(KEEPSET_WGMMA_TEXT(shape, "f16.f16", registers, a_name, b_name, adds_name)   \
                   : operands                                                                   \
                   : "l"(a), "l"(b), "r"(adds));                                                \
    }                                                                                           \
  }
// A list of operands has commas of its own.
#define KEEPSET_WGMMA_LIST(...) __VA_ARGS__

KEEPSET_WGMMA_OVERLOAD(32, "m64n64k16", KEEPSET_WGMMA_D0,
                       KEEPSET_WGMMA_LIST(KEEPSET_WGMMA_32(d, 0)), "%32", "%33", "%34")
KEEPSET_WGMMA_OVERLOAD(64, "m64n128k16", KEEPSET_WGMMA_D0 ", " KEEPSET_WGMMA_D1,
                       KEEPSET_WGMMA_LIST(KEEPSET_WGMMA_64(d, 0)), "%64", "%65", "%66")
KEEPSET_WGMMA_OVERLOAD(128, "m64n256k16",
                       KEEPSET_WGMMA_D0 ", " KEEPSET_WGMMA_D1 ", " KEEPSET_WGMMA_D2
                                        ", " KEEPSET_WGMMA_D3,
                       KEEPSET_WGMMA_LIST(KEEPSET_WGMMA_64(d, 0), KEEPSET_WGMMA_64(d, 64)), "%128",
                       "%129", "%130")

#undef KEEPSET_WGMMA_LIST
#undef KEEPSET_WGMMA_OVERLOAD
#undef KEEPSET_WGMMA_TEXT
#undef KEEPSET_WGMMA_64
#undef KEEPSET_WGMMA_32
#undef KEEPSET_WGMMA_16
#undef KEEPSET_WGMMA_4
#undef KEEPSET_WGMMA_D3
#undef KEEPSET_WGMMA_D2
#undef KEEPSET_WGMMA_D1
#undef KEEPSET_WGMMA_D0

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_HOPPER_WGMMA_CUH_
