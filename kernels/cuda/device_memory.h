// Device memory that stays allocated between operations, so that a warm backend allocates nothing
// within one; or that is allocated once, and never more.
#ifndef KEEPSET_KERNELS_CUDA_DEVICE_MEMORY_H_
#define KEEPSET_KERNELS_CUDA_DEVICE_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/compute_backend.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/device_region.h"

namespace keepset::kernels::cuda {

class DevicePool;

// Device memory on loan from a pool, which must outlive it. Move-only.
class DeviceBlock {
 public:
  DeviceBlock() = default;
  DeviceBlock(DevicePool* pool, std::byte* data, int64_t bytes)
      : pool_(pool), data_(data), bytes_(bytes) {}
  DeviceBlock(DeviceBlock&& other) noexcept { Swap(other); }
  DeviceBlock& operator=(DeviceBlock&& other) noexcept {
    Swap(other);
    return *this;
  }
  ~DeviceBlock();

  // Aligned to 256 bytes.
  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

  // Returns to nobody.
  void Leak() { pool_ = nullptr; }

 private:
  void Swap(DeviceBlock& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  DevicePool* pool_ = nullptr;
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Thread-safe. A returned block may be lent again at once: whoever returns it has waited for the
// streams that used it (DeferredBlocks).
class DevicePool {
 public:
  // Blocks beyond `most_kept_bytes` of unused ones are given back to the device.
  DevicePool(int device, DeviceHealth& health, int64_t most_kept_bytes)
      : device_(device), health_(health), most_kept_bytes_(most_kept_bytes) {}
  ~DevicePool();

  // From now on every block is a piece of the region, and nothing is allocated. Before the first
  // Acquire.
  void UseRegion(std::unique_ptr<DeviceRegion> region) { region_ = std::move(region); }
  // Whether blocks are pieces of a region: then to return one and to take it again costs nothing.
  bool is_fixed() const { return region_ != nullptr; }

  // At least `bytes` (>= 1) of any content. ResourceExhausted when the device or the region has no
  // more.
  absl::StatusOr<DeviceBlock> Acquire(int64_t bytes);

  DeviceMemoryUse use() const;

 private:
  friend class DeviceBlock;

  void Release(std::byte* data, int64_t bytes);
  void FreeKept() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void NoteUse(int64_t change) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const int device_;
  DeviceHealth& health_;
  const int64_t most_kept_bytes_;
  std::unique_ptr<DeviceRegion> region_;  // Null: blocks are allocated one by one.
  mutable absl::Mutex mutex_;
  std::multimap<int64_t, std::byte*> kept_ ABSL_GUARDED_BY(mutex_);  // by size
  int64_t kept_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t used_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t peak_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

// Blocks that a stream may still use; they return to their pool when the stream was waited for.
// Thread-safe.
class DeferredBlocks {
 public:
  void Add(DeviceBlock block);
  // The stream is idle: everything added so far returns.
  void Flush();
  // As Flush; what is added later, of an operation that has ended, returns at once, until Open.
  void Close();
  void Open();
  // The stream cannot be waited for: what was added, and what is added later, returns to nobody.
  void Leak();

 private:
  absl::Mutex mutex_;
  std::vector<DeviceBlock> blocks_ ABSL_GUARDED_BY(mutex_);
  bool is_closed_ ABSL_GUARDED_BY(mutex_) = false;
  bool leaks_ ABSL_GUARDED_BY(mutex_) = false;
};

// Page-locked host memory, which copies to and from the device without a detour. Grow-only.
class PinnedBuffer {
 public:
  explicit PinnedBuffer(DeviceHealth& health) : health_(health) {}
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  ~PinnedBuffer();

  // The content is lost when it grows; no copy from or to it may be under way then.
  absl::Status Reserve(int64_t bytes);
  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

  // Is never freed: queued copies may use it.
  void Leak() { data_ = nullptr; }

 private:
  DeviceHealth& health_;
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_DEVICE_MEMORY_H_
