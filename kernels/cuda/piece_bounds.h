// Where the tests emulate a device under AddressSanitizer, whoever touches device memory that
// nobody asked for ends the program. Elsewhere these do nothing.
#ifndef KEEPSET_KERNELS_CUDA_PIECE_BOUNDS_H_
#define KEEPSET_KERNELS_CUDA_PIECE_BOUNDS_H_

#include <cstddef>
#include <cstdint>

#if defined(KEEPSET_EMULATED_DEVICE) && defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace keepset::kernels::cuda {

#if defined(KEEPSET_EMULATED_DEVICE) && defined(__SANITIZE_ADDRESS__)
// The addresses of a region of no memory are above those of processes.
inline bool IsOfProcess(const std::byte* data) {
  return reinterpret_cast<uintptr_t>(data) >> 47 == 0;
}

// Bytes of an allocation that may be touched from now on.
inline void OpenBytes(const std::byte* data, int64_t bytes) {
  if (IsOfProcess(data)) ASAN_UNPOISON_MEMORY_REGION(data, static_cast<size_t>(bytes));
}
// And such as may not, until they are opened or freed.
inline void CloseBytes(const std::byte* data, int64_t bytes) {
  if (IsOfProcess(data)) ASAN_POISON_MEMORY_REGION(data, static_cast<size_t>(bytes));
}
#else
inline void OpenBytes(const std::byte* /*data*/, int64_t /*bytes*/) {}
inline void CloseBytes(const std::byte* /*data*/, int64_t /*bytes*/) {}
#endif

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_PIECE_BOUNDS_H_
