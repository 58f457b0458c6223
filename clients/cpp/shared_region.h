// Anonymous shared memory of this process that a server on the same machine can map: a memfd,
// sealed against shrinking, with a bump allocator for tensors.
//
// The region owns its descriptor and its mapping; pointers into it die with it. Allocate and Reset
// are not thread-safe; everything else is immutable after Create.
#ifndef KEEPSET_CLIENTS_CPP_SHARED_REGION_H_
#define KEEPSET_CLIENTS_CPP_SHARED_REGION_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace keepset::client {

class SharedRegion {
 public:
  // `label` shows up in /proc/self/maps only. The size is rounded up to whole pages; pages cost
  // memory when they are first written. InvalidArgument: size below 1. ResourceExhausted: the
  // kernel gives no memory.
  static absl::StatusOr<std::unique_ptr<SharedRegion>> Create(const std::string& label,
                                                              int64_t size_bytes);
  ~SharedRegion();
  SharedRegion(const SharedRegion&) = delete;
  SharedRegion& operator=(const SharedRegion&) = delete;

  std::byte* data() const { return data_; }
  int64_t size_bytes() const { return size_bytes_; }
  int fd() const { return fd_; }

  // Whether [begin, begin + bytes) lies inside.
  bool Contains(const void* begin, int64_t bytes) const;

  // The next `bytes` bytes, aligned to a cache line. ResourceExhausted when they do not fit.
  absl::StatusOr<std::byte*> Allocate(int64_t bytes);
  // Forgets every allocation; the bytes stay as they are.
  void Reset() { used_bytes_ = 0; }

  // Bytes that `bytes` take in the allocator, for sizing a region.
  static int64_t AllocationBytes(int64_t bytes);

 private:
  SharedRegion(int fd, std::byte* data, int64_t size_bytes)
      : fd_(fd), data_(data), size_bytes_(size_bytes) {}

  const int fd_;
  std::byte* const data_;
  const int64_t size_bytes_;
  int64_t used_bytes_ = 0;
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_SHARED_REGION_H_
