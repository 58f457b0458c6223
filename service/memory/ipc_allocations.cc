#include "service/memory/ipc_allocations.h"

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace keepset::service {
namespace {

uint64_t BytesOf(const DeviceRange& range) { return range.bytes_before + range.bytes; }

}  // namespace

absl::StatusOr<std::unique_ptr<IpcAllocations::Use>> IpcAllocations::Open(int device,
                                                                          const std::string& handle,
                                                                          uint64_t generation,
                                                                          SeenGenerations* seen) {
  absl::MutexLock lock(&mutex_);
  const auto found = entries_.find(handle);
  if (found != entries_.end() && found->second.generation != generation) {
    return absl::FailedPreconditionError(
        absl::StrCat("generation ", generation, ": generation ", found->second.generation,
                     " of this handle is still mapped; retire its regions first"));
  }
  if (seen != nullptr) KEEPSET_RETURN_IF_ERROR(seen->Check(handle, generation));
  if (found == entries_.end()) {
    KEEPSET_ASSIGN_OR_RETURN(const DeviceRange range, driver_->OpenIpc(device, handle));
    entries_[handle] = {device, range, generation, 0};
    mapped_bytes_ += BytesOf(range);
  } else if (found->second.device != device) {
    // The driver would answer the mapping that is there, and its close would end both.
    return absl::InvalidArgumentError("device_uuid: this handle is of another device's memory");
  }
  Entry& entry = entries_[handle];
  ++entry.users;
  if (seen != nullptr) seen->Note(handle, generation);
  return std::make_unique<Use>(shared_from_this(), handle, entry.range);
}

void IpcAllocations::Drop(const std::string& handle) {
  absl::MutexLock lock(&mutex_);
  const auto found = entries_.find(handle);
  KEEPSET_CHECK(found != entries_.end());
  if (--found->second.users > 0) return;
  // A driver that refuses has lost the mapping already (the device failed): nothing is left to do.
  static_cast<void>(driver_->CloseIpc(found->second.device, found->second.range.base));
  mapped_bytes_ -= BytesOf(found->second.range);
  entries_.erase(found);
}

}  // namespace keepset::service
