// Allocations of other processes mapped through legacy CUDA IPC, counted: the driver has one
// mapping per allocation and process, and one close takes it from every user.
#ifndef KEEPSET_SERVICE_MEMORY_IPC_ALLOCATIONS_H_
#define KEEPSET_SERVICE_MEMORY_IPC_ALLOCATIONS_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "service/memory/cuda_driver.h"
#include "service/memory/seen_generations.h"

namespace keepset::service {

// Thread-safe; opening and closing are serialised, so that no close meets the open of the next
// user.
class IpcAllocations : public std::enable_shared_from_this<IpcAllocations> {
 public:
  explicit IpcAllocations(std::shared_ptr<CudaDriver> driver) : driver_(std::move(driver)) {}

  // One user of a mapping; unmaps with the last one. Move-free: held by pointer.
  class Use {
   public:
    Use(std::shared_ptr<IpcAllocations> owner, std::string handle, DeviceRange range)
        : owner_(std::move(owner)), handle_(std::move(handle)), range_(range) {}
    ~Use() { owner_->Drop(handle_); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    const DeviceRange& range() const { return range_; }

   private:
    const std::shared_ptr<IpcAllocations> owner_;
    const std::string handle_;
    const DeviceRange range_;
  };

  // The whole allocation behind `handle`. Handle bytes are no identity: a driver may hand out the
  // same ones for a new allocation at a freed address, so `generation` (the exporter's count of its
  // allocations) tells them apart. seen: of the exporter's session, null when it is new.
  //
  // FailedPrecondition: another generation of these bytes is still mapped, or a later one was in
  // this session. InvalidArgument: they are mapped, as memory of another device. Otherwise the
  // errors of CudaDriver::OpenIpc.
  absl::StatusOr<std::unique_ptr<Use>> Open(int device, const std::string& handle,
                                            uint64_t generation, SeenGenerations* seen);

  // Does not wait for an open or a close that is under way.
  uint64_t mapped_bytes() const { return mapped_bytes_; }

 private:
  struct Entry {
    int device = 0;
    DeviceRange range;
    uint64_t generation = 0;
    int64_t users = 0;
  };
  void Drop(const std::string& handle);

  const std::shared_ptr<CudaDriver> driver_;
  absl::Mutex mutex_;  // held over calls of the driver, which may take seconds
  std::map<std::string, Entry> entries_ ABSL_GUARDED_BY(mutex_);  // by handle
  std::atomic<uint64_t> mapped_bytes_ = 0;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_IPC_ALLOCATIONS_H_
