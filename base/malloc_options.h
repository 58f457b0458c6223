// Options of the C library's allocator for programs of ours. A library leaves its process alone.
#ifndef KEEPSET_BASE_MALLOC_OPTIONS_H_
#define KEEPSET_BASE_MALLOC_OPTIONS_H_

namespace keepset {

// Freed blocks of up to 32 MiB stay with the process for the next call, and up to 128 MiB at the
// end of the heap do. By default glibc gives both back at once, and the kernel zeroes the pages of
// every tensor that arrives inline anew. To be called before the first thread.
void KeepFreedMemory();

}  // namespace keepset

#endif  // KEEPSET_BASE_MALLOC_OPTIONS_H_
