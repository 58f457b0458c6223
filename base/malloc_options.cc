#include "base/malloc_options.h"

#include <malloc.h>

namespace keepset {
namespace {

constexpr int kLargestBlockOfHeap = 32 << 20;  // the most that glibc accepts
constexpr int kFreeEndOfHeap = 128 << 20;

}  // namespace

void KeepFreedMemory() {
  // Another allocator in the process (a sanitizer's) may refuse: then it decides for itself.
  mallopt(M_MMAP_THRESHOLD, kLargestBlockOfHeap);
  mallopt(M_TRIM_THRESHOLD, kFreeEndOfHeap);
}

}  // namespace keepset
