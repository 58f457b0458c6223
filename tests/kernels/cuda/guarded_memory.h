// Memory of the emulated device: begins as NaN, and who touches what lies before or behind it ends
// the program; behind it to the byte under AddressSanitizer, to the alignment elsewhere.
#ifndef KEEPSET_TESTS_KERNELS_CUDA_GUARDED_MEMORY_H_
#define KEEPSET_TESTS_KERNELS_CUDA_GUARDED_MEMORY_H_

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <utility>

#include "base/check.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace keepset::kernels::cuda {

class GuardedMemory {
 public:
  // alignment: a power of two, at most a page.
  GuardedMemory(size_t bytes, size_t alignment) : bytes_(bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t used = (bytes + page - 1) / page * page;
    mapped_bytes_ = used + page;
    void* const memory =
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    KEEPSET_CHECK(memory != MAP_FAILED);
    mapped_ = static_cast<std::byte*>(memory);
    KEEPSET_CHECK(mprotect(mapped_ + used, page, PROT_NONE) == 0);
    data_ = mapped_ + (used - bytes) / alignment * alignment;
    Fill();
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(mapped_, static_cast<size_t>(data_ - mapped_));
    ASAN_POISON_MEMORY_REGION(data_ + bytes, static_cast<size_t>(mapped_ + used - data_) - bytes);
#endif
  }
  GuardedMemory(GuardedMemory&& other) noexcept
      : mapped_(std::exchange(other.mapped_, nullptr)),
        mapped_bytes_(other.mapped_bytes_),
        data_(other.data_),
        bytes_(other.bytes_) {}
  GuardedMemory& operator=(GuardedMemory&&) = delete;
  ~GuardedMemory() {
    if (mapped_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
    // Whoever is given these pages next knows nothing of it.
    ASAN_UNPOISON_MEMORY_REGION(mapped_, mapped_bytes_);
#endif
    munmap(mapped_, mapped_bytes_);
  }

  // With NaN.
  void Fill() const { std::memset(data_, 0xff, bytes_); }

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* mapped_;
  size_t mapped_bytes_;
  std::byte* data_;
  size_t bytes_;
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_TESTS_KERNELS_CUDA_GUARDED_MEMORY_H_
